"""Constraints on activations: what rules cut, and that other rules are another program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from paligemma_med.models.layers import activations
from paligemma_med.parallel import sharding

NAMES = ("act_batch", "act_len", "act_mlp")


@jax.jit
def f(x):
    return activations.constrain(x * 2, *NAMES)


def spec_of(rules, shape=(8, 4, 6)):
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    x = jax.device_put(jnp.ones(shape), sharding.replicated(mesh))
    with sharding.rules(dict(sharding_rules=rules), mesh):
        spec = tuple(f(x).sharding.spec)
    return P(*spec, *[None] * (len(shape) - len(spec)))


def test_without_rules_nothing_is_added():
    x = jnp.ones((2, 3, 4))
    assert activations.constrain(x, *NAMES) is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(f)(x))


@pytest.mark.parametrize(
    "rules, expected",
    [
        ([("act_batch", "data")], P("data", None, None)),
        ([("act_batch", "data"), ("act_mlp", "model")], P("data", None, "model")),
        ([("act_batch", ("data", "model"))], P(("data", "model"), None, None)),
        # The first rule takes the axis, whatever the order of dimensions.
        ([("act_len", "data"), ("act_batch", "data")], P(None, "data", None)),
        # 6 is not divided by 4: the rule is left out, and the next one for the same name holds.
        ([("act_mlp", "data"), ("act_mlp", "model")], P(None, None, "model")),
        ([("act_heads", "data")], P(None, None, None)),  # not of this array
    ],
)
def test_rules(rules, expected):
    """One jitted function throughout: it is traced anew under other rules."""
    assert spec_of(rules) == expected


def test_a_batch_that_does_not_divide_stays_whole():
    assert spec_of([("act_batch", "data")], (1, 4, 6)) == P(None, None, None)
