"""Random adapters for tiny random models, such as the PaliGemmas of tests/models/hf.py."""

import json

import numpy as np

from paligemma_med.checkpoints import adapter, peft
from paligemma_med.models import lora_targets
from paligemma_med.models.leaves import flatten_tree
from tests.models import hf

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]
LINEAR = [*ATTENTION, "fc1", "fc2", "gate_proj", "up_proj", "down_proj", "linear"]

ALL = [(".*", dict(rank=3, alpha=6))]
# Ranks, scales and dropouts unlike each other; neither tower whole.
MIXED = [
    ("img/.*/(query|value)/kernel", dict(rank=2, alpha=5)),
    ("img/.*MlpBlock_0/.*", dict(rank=1, alpha=0.7)),
    ("img/head/kernel", dict(rank=5, alpha=5)),
    (".*:v", dict(rank=4, alpha=3)),
    ("llm/.*attn_vec_einsum/w", dict(rank=3, alpha=6)),
    ("llm/.*mlp/.*", dict(rank=3, alpha=4)),
]


def random_adapter(name, rules=ALL, seed=0, dtype=np.float32):
    """An adapter for case `name` in which neither factor is 0; it moves logits by about 1."""
    return random_on(flatten_tree(hf.reference(name)[3]), rules, seed, dtype)


def random_on(flat, rules, seed=0, dtype=np.float32):
    """The same for any model's parameters {path: array}."""
    specs = lora_targets.resolve(rules, flat)
    factors = {}
    for target, spec in specs.items():
        a, b = lora_targets.factor_shapes(target, spec, flat[target.param].shape)
        if not target.stacked:
            a, b = (1, *a), (1, *b)
        rng = np.random.default_rng([seed, *target.name.encode()])
        inputs, outputs = int(np.prod(a[1:-1])), int(np.prod(b[2:]))
        factors[target] = (
            rng.normal(0, inputs**-0.5, (a[0], inputs, spec.rank)).astype(dtype),
            rng.normal(0, 0.2, (a[0], spec.rank, outputs)).astype(dtype),
        )
    return adapter.Adapter(specs, factors)


def assert_equal(a, b):
    """Same targets, same specs, factors equal to the bit and of one type."""
    assert dict(a.specs) == dict(b.specs)
    assert a.factors.keys() == b.factors.keys()
    for target, pair in a.factors.items():
        for x, y in zip(pair, b.factors[target], strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape), target.name
            assert x.tobytes() == y.tobytes(), target.name


def edit(folder, **fields):
    """Changes fields of an adapter's config."""
    path = folder / peft.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
