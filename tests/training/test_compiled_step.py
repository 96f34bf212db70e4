"""What a train step must not hold or compute, read off its program rather than timed.

Logits beyond the supervised positions, wider copies of frozen weights, gradients and
optimizer state of frozen leaves: each is easily brought back by an innocent change, costs
gigabytes at the true size, and no test of values would notice. What is looked at is the traced
program (jaxpr), since XLA rewrites it for each kind of device: on a CPU it makes float32 copies of
its own. Each guard is also shown a step that does what it forbids.

Axis sizes are all different, so that an array is known by its shape.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from paligemma_med.models import flops, paligemma
from paligemma_med.models import loss as losses
from paligemma_med.models.layers import quantised
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run
from paligemma_med.training import step as train_step
from tests import tiny

pytestmark = pytest.mark.usefixtures("optimised_file")

BATCH, TEXT_LEN, SUPERVISED, VOCAB = 16, 37, 8, 1009
MODEL = dict(
    img=dict(width=20, depth=3, mlp_dim=28, num_heads=2, patch_size=16),
    llm=dict(width=24, depth=5, mlp_dim=46, num_heads=3, num_kv_heads=1, head_dim=22, vocab_size=VOCAB),
)
CONSTANT = dict(decay_type="constant")
ADAPTERS = dict(
    lora=[("img/Transformer/.*|llm/layers/.*", dict(rank=2))],
    schedule=[(".*/lora_[ab]", CONSTANT), (".*", None)],
)
STAGES = {
    "stage 1": dict(schedule=[("img/head/.*", CONSTANT), (".*", None)]),
    "lora": ADAPTERS,
    "full": dict(schedule=CONSTANT),
}


def config(policy="nothing_saveable", **kw):
    """bfloat16 activations and frozen weights unless told otherwise; layers in a loop."""
    model = {tower: dict(sizes, remat_policy=policy) for tower, sizes in MODEL.items()}
    kw = dict(dtype="bfloat16", frozen_dtype="bfloat16", supervised_len=SUPERVISED) | kw
    c = tiny.config("/no/such/folder", model=model, text_len=TEXT_LEN, **kw)
    c.input.batch_size = BATCH
    return c


def trace(c):
    return dry_run.trace_step(TrainingSetup.without_data(c))


@pytest.fixture(scope="module")
def lora_step():
    """The LoRA step of `config`, traced."""
    return trace(config(**ADAPTERS))


def _inner(value):
    """Jaxprs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _inner(v)


def equations(jaxpr, times=1):
    """(equation, how often it runs), also of what lies within loops and calls."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        again = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for value in eqn.params.values():
            for inner in _inner(value):
                yield from equations(inner, again)


def arrays(step):
    """(primitive's name, aval) of all that the step makes."""
    for eqn, _ in equations(step.traced.jaxpr.jaxpr):
        for v in eqn.outvars:
            if hasattr(v.aval, "shape"):
                yield eqn.primitive.name, v.aval


def _layers(name):
    return 1 if "/layers/" in name or "/encoderblock/" in name else 0


def frozen_shapes(step, *, min_ndim):
    """Of frozen leaves with so many axes beside that of layers: {sorted shape: name}, both of the
    whole leaf and of one layer. Sorted, so that a transposed copy is known, too; leaves of one
    shape go by the name of the last."""
    out = {}
    for name, x in step.state.frozen.items():
        if x.ndim - _layers(name) >= min_ndim:
            out[_key(x.shape)] = name
            out[_key(x.shape[_layers(name) :])] = name
    return out


def _key(shape):
    return tuple(sorted(n for n in shape if n > 1))


# --- The guards: each gives what it found, and nothing is what it should find ---


def most_logits(step):
    """Elements of the largest array along the vocabulary that isn't shaped as the table."""
    table = _key((VOCAB, MODEL["llm"]["width"]))
    found = (a for _, a in arrays(step) if VOCAB in a.shape and _key(a.shape) != table)
    return max(a.size for a in found)


def float32_kernels(step):
    """Kernels of frozen leaves that exist in float32, whole or of one layer."""
    known = frozen_shapes(step, min_ndim=2)
    return {known[_key(a.shape)] for _, a in arrays(step) if a.dtype == jnp.float32 and _key(a.shape) in known}


def stacks(step):
    """{sorted shape: name} of frozen leaves with an axis of layers."""
    return {_key(x.shape): n for n, x in step.state.frozen.items() if _layers(n)}


def float32_stacks(step):
    """Frozen leaves of all layers that exist in float32 at once: made outside of the loop over
    layers, or layer by layer as its output."""
    known = stacks(step)
    return {known[_key(a.shape)] for _, a in arrays(step) if a.dtype == jnp.float32 and _key(a.shape) in known}


def dense_frozen(step):
    """{name: dense leaf} of what is frozen, quantised or not."""
    made = flatten_tree(paligemma.abstract_params(step.setup.model, image_size=tiny.RES))
    return {n: x for n, x in made.items() if n not in step.state.trained}


def dense_stacks(step, dtype):
    """Frozen kernels of all layers that exist in `dtype` at once, other than as they are stored."""
    known = {_key(x.shape): n for n, x in dense_frozen(step).items() if _layers(n) and x.ndim > 2}
    return {known[_key(a.shape)] for _, a in arrays(step) if a.dtype == dtype and _key(a.shape) in known}


# What makes gradients of weights (and, as sums of them, of what is used more than once), biases and
# the embedding table; what merely moves or casts a leaf is not among them.
_GRADIENTS = ("dot_general", "conv_general_dilated", "reduce_sum", "scatter-add", "add_any", "scan")


def gradients_of_frozen(step):
    """Frozen leaves for which something is computed that has their shape."""
    known = frozen_shapes(step, min_ndim=1)
    return {known[_key(a.shape)] for primitive, a in arrays(step) if primitive in _GRADIENTS and _key(a.shape) in known}


def state_of_frozen(step):
    """Shapes in the optimizer's state beyond two moments of each trained leaf."""
    left = [x.shape for x in jax.tree.leaves(step.state.opt_state) if x.ndim]
    for x in 2 * list(step.state.trained.values()):
        left.remove(x.shape)
    return left


def product_flops(step):
    """FLOPs of matrix products of one example, each as often as its loop runs: to the last of them
    what the formula counts. XLA's `cost_analysis` counts a loop's body once, and norms and softmax,
    too; tests/models/test_flops.py holds the formula to it within 5 %, on unrolled steps."""
    total = 0
    for eqn, times in equations(step.traced.jaxpr.jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * times * eqn.outvars[0].aval.size * inner
        if eqn.primitive.name == "conv_general_dilated":
            # Patches don't overlap: each weight meets each of them once, whichever of input,
            # output and kernel is the result.
            sizes = [v.aval.size for v in (*eqn.invars, *eqn.outvars)]
            image = BATCH * tiny.RES**2 * 3
            assert image in sizes
            total += 2 * times * image * MODEL["img"]["width"]
    return total / BATCH


# --- What they find ---


def test_sizes_tell_arrays_apart(lora_step):
    """Or a guard would take one for another: no frozen leaf has the shape of a trained one."""
    frozen = frozen_shapes(lora_step, min_ndim=1)
    trained = {_key(x.shape[_layers(n) :]) for n, x in lora_step.state.trained.items()}
    assert not trained & {*frozen}
    assert len(frozen) > 20 and len(trained) > 5


def test_logits_are_those_of_supervised_positions(lora_step):
    assert most_logits(lora_step) == BATCH * SUPERVISED * VOCAB


def test_in_chunks_there_are_fewer_logits():
    step = trace(config(**ADAPTERS, loss_chunk=4))
    assert most_logits(step) == BATCH * 4 * VOCAB


def test_frozen_bfloat16_stays_bfloat16(lora_step):
    assert not float32_kernels(lora_step)
    assert not float32_stacks(lora_step)


POLICIES = ("nothing_saveable", "dots_with_no_batch_dims_saveable", "none")


@pytest.mark.parametrize("policy", POLICIES)
def test_float32_activations_cast_one_layer_at_a_time(policy):
    step = trace(config(policy, **ADAPTERS, dtype="float32"))
    assert float32_kernels(step)  # of a layer each
    assert not dense_stacks(step, jnp.float32)


@pytest.mark.parametrize("policy, kind", [*zip(POLICIES, ("int8", "nf4", "nf4"))])
def test_quantised_weights_are_dense_one_layer_at_a_time(monkeypatch, policy, kind):
    monkeypatch.setattr(quantised, "_COPY", 7 * 11 * MODEL["llm"]["width"])
    monkeypatch.setattr(quantised, "_few", lambda x: True)
    vocab = 7 * 11 * 13  # in 13 parts, in one group
    c = config(policy, **ADAPTERS, frozen_dtype=kind)
    c.model.llm.vocab_size = vocab
    step = trace(c)
    assert not dense_stacks(step, jnp.bfloat16) and not dense_stacks(step, jnp.float32)
    width = MODEL["llm"]["width"]
    floats = {_key(a.shape) for _, a in arrays(step) if jnp.issubdtype(a.dtype, jnp.floating)}
    assert _key((vocab, width)) not in floats and _key((7 * 11, width)) in floats
    # Products are computed again where the policy says, and for the parts of the table never.
    found = flops.count(step.setup.model, step.state.trained, res=c.res, text_len=TEXT_LEN, supervised_len=SUPERVISED)
    assert product_flops(step) == found.per_example_executed


def test_nothing_is_computed_for_frozen_leaves(lora_step):
    assert not gradients_of_frozen(lora_step)
    assert not state_of_frozen(lora_step)


@pytest.mark.parametrize(
    "stage, kw",
    [
        ("stage 1", {}),
        ("lora", dict(loss_chunk=4)),
        ("lora", dict(policy="dots_with_no_batch_dims_saveable")),
        ("full", {}),
    ],
)
def test_flops_of_the_loops_are_those_of_the_formula(stage, kw):
    c = config(**STAGES[stage], **kw)
    step = trace(c)
    found = flops.count(
        step.setup.model,
        step.state.trained,
        res=c.res,
        text_len=TEXT_LEN,
        supervised_len=SUPERVISED,
        loss_chunk=c.get("loss_chunk"),
    )
    assert product_flops(step) == found.per_example_executed


def test_state_is_written_over_and_nothing_else_is(lora_step):
    """Trained leaves and optimizer state: their buffers hold the results. Those of the batch can't,
    since no result has their shape; a frozen leaf is wanted again."""
    lowered = lora_step.traced.lower()
    info = lowered.args_info[0]
    assert [{x.donated for x in jax.tree.leaves(arg)} for arg in info] == [
        {True},
        {True},
        {False},
        {False},
        {False},
    ]
    state = jax.tree.leaves((lora_step.state.trained, lora_step.state.opt_state))
    assert lowered.as_text().count("tf.aliasing_output") == len(state)


# --- Steps that do what is forbidden ---


def mutant(monkeypatch, where, name, made):
    """The LoRA step with the function `name` replaced by made(the true one)."""
    monkeypatch.setattr(where, name, made(getattr(where, name)))
    return trace(config(**ADAPTERS))


def test_logits_everywhere_would_be_seen(monkeypatch):
    step = mutant(monkeypatch, losses, "supervised_positions", lambda true: lambda mask, _: true(mask, None))
    assert most_logits(step) == BATCH * TEXT_LEN * VOCAB


def test_a_cast_of_all_weights_would_be_seen(monkeypatch):
    def made(true):
        return lambda flat: true({n: x.astype(jnp.float32) for n, x in flat.items()})

    step = mutant(monkeypatch, train_step, "unflatten_tree", made)
    assert {"llm/layers/mlp/gating_einsum", "llm/embedder/input_embedding"} <= float32_kernels(step)
    assert float32_stacks(step) == {*stacks(step).values()}


@pytest.mark.parametrize("frozen_dtype", ["bfloat16", "nf4"])
def test_casts_that_are_kept_would_be_seen(monkeypatch, frozen_dtype):
    def product(f, x, weight):
        return f(x, quantised._dense(weight.value, weight.scale, weight.shape, x.dtype))

    monkeypatch.setattr(quantised, "product", product)
    kw = dict(dtype="float32", frozen_dtype=frozen_dtype)
    step = trace(config("none", **ADAPTERS, **kw))
    found = dense_stacks(step, jnp.float32)
    assert {"llm/layers/mlp/linear", "llm/layers/attn/q_einsum/w"} <= found


def test_gradients_by_all_would_be_seen(monkeypatch):
    def made(true):
        def grad_by_all(f, has_aux):
            def run(*args):
                value, grads = true(f, (0, 1), has_aux=has_aux)(*args)
                return value, grads[0]

            return run

        return grad_by_all

    step = mutant(monkeypatch, train_step.jax, "value_and_grad", made)
    assert gradients_of_frozen(step) == {*frozen_shapes(step, min_ndim=1).values()}


# --- What XLA makes of it ---


@pytest.mark.slow
def test_compiled_program_holds_no_more_logits():
    c = config(**ADAPTERS, dtype="float32", frozen_dtype="float32")
    c.mesh = [("data", 8)]
    text = dry_run.compile_step(TrainingSetup.without_data(c)).compiled.as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w\d+\[([\d,]+)\]", text)}
    rows = BATCH // 8
    with_logits = [s for s in shapes if VOCAB in s and MODEL["llm"]["width"] not in s]
    assert max(map(math.prod, with_logits)) == rows * SUPERVISED * VOCAB
    assert rows * TEXT_LEN * VOCAB not in map(math.prod, shapes)
