"""tools.bench profile: operations of a compiled program, and what they are for."""

import jax
import jax.numpy as jnp
import pytest

from tools.bench import profile_step


def test_operations_of_a_program_know_their_products_and_names():
    def f(x, w):
        with jax.named_scope("mlp"):
            y = x @ w
        with jax.named_scope("attn"):
            return jnp.cumsum(jnp.exp(y), axis=1)

    x = jnp.ones((64, 64))
    text = jax.jit(f).lower(x, x).compile().as_text()
    found = list(profile_step.operations(text).values())
    products = [op for product, op in found if product]
    assert products and all("/mlp/" in op for op in products)
    assert any("/attn/" in op for product, op in found if not product)


@pytest.mark.parametrize(
    ("product", "op", "want"),
    [
        (True, "jit(step)/llm/layers/mlp/dot_general", "MLPs: products"),
        (True, "jit(step)/llm/layers/attn/q_einsum/lora/dot_general", "adapters: products"),
        (True, "img/encoderblock/MultiHeadDotProductAttention_0/query/dot_general", "attention: projections"),
        (True, "jit(step)/llm/layers/attn/dot_general", "attention: scores and values"),
        (True, "jit(step)/conv_general_dilated", "other products"),
        (False, "jit(step)/llm/layers/attn/exp", "attention: the rest"),
        (False, "", "layers: what is kept, taken, cleared"),
        (False, "jit(step)/mul", "all else"),
    ],
)
def test_groups(product, op, want):
    assert profile_step.group(product, op) == want


@pytest.mark.slow
def test_profile_of_the_small_size():
    found = profile_step.run(
        size="tiny",
        what="lora",
        dtype=None,
        batch_size=None,
        remat_policy=None,
        scan=None,
        attn_impl=None,
        top=5,
    )
    assert {"MLPs: products", "attention: projections"} <= set(found["groups"])
    assert sum(found["groups"].values()) == pytest.approx(found["milliseconds"], abs=1)
    assert len(found["operations"]) == 5
