"""On a CPU the programs for large 16-bit weights hold no float32 copy of them: neither of a stack of layers nor of the
vocabulary table. What `jax.jit` makes of the same functions does, which shows that it would be seen.

Memory is asked of the compiler; nothing is allocated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med.decode.generate import _generate
from paligemma_med.models import lean, vlm
from paligemma_med.models.layers import quantised
from paligemma_med.parallel import sharding
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run
from tests import tiny

pytestmark = pytest.mark.usefixtures("optimised_file")

RES = 32
MODEL = dict(
    img=dict(width=64, depth=6, mlp_dim=1024, num_heads=2, patch_size=16),
    llm=dict(width=64, depth=6, mlp_dim=4096, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=16_384),
)
S = jax.ShapeDtypeStruct


def stacks(params):
    """Bytes of the largest stack of layers."""
    return max(x.size for x in jax.tree.leaves(params) if x.ndim > 2) * 2


def temporary(lowered):
    return lowered.compile().memory_analysis().temp_size_in_bytes


def lower_answer(jitted):
    """The program that answers a question in bfloat16, and its parameters."""
    model = vlm.Model(**MODEL, dtype="bfloat16")
    params = jax.tree.map(lambda x: S(x.shape, jnp.bfloat16), vlm.abstract_params(model, image_size=RES))
    text, one = S((1, 16), "int32"), S((), "float32")
    batch = dict(image=S((1, RES, RES, 3), "float32"), text=text, mask_ar=text, mask_input=text)
    batch |= dict(row_id=S((1,), "uint32"), skip=S((1,), bool))
    key = jax.eval_shape(lambda: jax.random.key(0))
    how = dict(max_new_tokens=4, num_samples=1, greedy=True, text_len=16)
    return jitted.lower(model, params, batch, key, one, one, one, S((), "int32"), **how), params


def test_answering_casts_a_layer_at_a_time_and_no_table(monkeypatch):
    plain, params = lower_answer(_generate)  # small weights are left to JAX
    monkeypatch.setattr(lean, "LARGE", 0)
    large, _ = lower_answer(_generate)
    # gate and up of all layers in float32 are twice their bytes; those of one layer a third of them.
    assert temporary(large) < 0.7 * stacks(params) < 2 * stacks(params) < temporary(plain)


def test_so_does_a_train_step(monkeypatch):
    head = [("img/head/.*", dict(decay_type="constant")), (".*", None)]
    kw = dict(dtype="bfloat16", frozen_dtype="bfloat16", supervised_len=8, schedule=head)
    c = tiny.config("/no/such/folder", model=MODEL, **kw)
    c.input.batch_size = 1
    monkeypatch.setattr(lean, "LARGE", 0)
    one = sharding.make_mesh([("data", 1)], devices=jax.devices()[:1])
    step = dry_run.trace_step(TrainingSetup.without_data(c, mesh=one))
    table = 4 * step.state.frozen["llm/embedder/input_embedding"].size  # its backward pass casts it
    assert temporary(step.traced.lower()) - table < stacks(step.state.frozen)


def test_values_and_gradients_stay():
    """A loop over layers whose weights are sliced, and logits of a single row."""
    key = jax.random.key(0)
    w = jax.random.normal(key, (3, 16, 16), jnp.bfloat16)
    table = quantised.Weight(jax.random.normal(key, (40, 16), jnp.bfloat16), None, (40, 16))
    x = jax.random.normal(key, (1, 1, 16), jnp.bfloat16)

    def f(x, w, value):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        weight = quantised.Weight(value, None, table.shape)
        return quantised.logits(x, weight)

    def with_gradients(*args):
        y, pull = jax.vjp(f, *args)
        return y, pull(y)

    def of(jit):
        return jax.device_get(jit(with_gradients)(x, w, table.value))

    for a, b in zip(*map(jax.tree.leaves, (of(jax.jit), of(lambda g: lean.jit(g, large=0)))), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0.02, atol=0.02 * np.abs(np.float32(a)).max())


def test_where_it_acts(monkeypatch):
    """For 16 bits, enough of them, on a CPU, and not within another program."""
    short, long = jnp.ones(1000, jnp.bfloat16), jnp.ones(1000, jnp.float32)
    ask = lean.jit(lambda *x: jnp.asarray(lean.is_for_large_weights_on_cpu()), large=2000)
    assert ask(short) and ask(short[:500], {"b": short[500:]})
    assert not ask(short[:999]) and not ask(long)
    assert not jax.jit(lambda x: ask(x))(short)
    assert ask.lower(S((1000,), jnp.bfloat16)).as_text() != ask.lower(S((999,), jnp.bfloat16)).as_text()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not ask(short)
