"""The same training on other meshes: equal losses, and the communication that each should need.

What is sent is read off the compiled program. Its sizes tell: the model's are chosen so that the
number of layers, the batch and each kernel's layer have sizes that nothing else has.
"""

import functools
import math
import re
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

from paligemma_med import decode, evaluate, experiment, predict, train, weights
from paligemma_med.models.layers import activations
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.parallel import sharding
from paligemma_med.pp.tokenizer import get_tokenizer
from paligemma_med.setup import Setup, TrainingSetup
from paligemma_med.training import describe
from paligemma_med.training import state as states
from paligemma_med.training import step as train_step
from tests import tiny

DEPTH, ROWS, WIDTH, VOCAB = 3, 24, 64, 1024
MODEL = dict(
    img=dict(variant="mu/16", depth=DEPTH, width=WIDTH, mlp_dim=192, num_heads=8),
    llm=dict(variant="gemma_mu", depth=DEPTH, width=WIDTH, mlp_dim=320, num_heads=8),
)
LORA = [(".*/query/kernel|.*/(kv|attn_vec)_einsum/w|.*/linear", dict(rank=4))]
QUICKLY = {"xla_backend_optimization_level": 0}  # of LLVM; what is sent is decided before
FSDP = 'fsdp(axis="data", min_size_to_shard_mb=0)'
BY_VOCAB = [("act_vocab", "data"), ("act_batch", "data")]
MESHES = {  # name: (mesh, strategy, rules)
    "one": ([("data", 1)], "replicate", None),
    "fsdp": ([("data", 8)], FSDP, None),
    "fsdp_vocab": ([("data", 8)], FSDP, BY_VOCAB),
    "fsdp_tp": ([("data", 4), ("model", 2)], f'tp(axis="model")|{FSDP}', None),
    "tp": ([("data", 1), ("model", 8)], 'tp(axis="model")', None),
}
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


class Run(NamedTuple):
    """A train step on a mesh: compiled, and what it starts from."""

    compiled: jax.stages.Compiled
    trained: dict
    opt_state: object
    frozen: dict
    mesh: jax.sharding.Mesh


def make_config(mesh, strategy, rules=None, *, lora=True):
    # Keys' biases have no gradient but rounding, which Adam with a small eps takes for a signal.
    all_of = [(".*", dict(decay_type="constant"))]
    return tiny.config(
        model=MODEL,
        mesh=mesh,
        lora=LORA if lora else None,
        lr=1e-2,
        optax=dict(eps=1e-4),
        schedule=[(".*/lora_[ab]", all_of[0][1]), (".*", None)] if lora else all_of,
        sharding_strategy=[(".*", strategy)] if isinstance(strategy, str) else strategy,
        sharding_rules=rules,
    )


def make_mesh(c):
    size = math.prod(n for _, n in c.mesh)
    return sharding.make_mesh(c.mesh, jax.devices()[:size])


def random_weights(abstract):
    """{name: numpy array}, random; so is lora_b, or lora_a would have no gradient at first."""
    rng = np.random.default_rng(0)
    return {n: rng.normal(0, 0.1, x.shape).astype("float32") for n, x in abstract.items()}


def start(c):
    mesh = make_mesh(c)
    setup = TrainingSetup.without_data(c, mesh=mesh)
    setup.num_examples, setup.total_steps = 480, 20
    state = states.of_params(setup, jax.device_put(random_weights(setup.abstract), setup.shardings))
    step = train_step.jitted(setup, state.trained)
    with sharding.rules(c, mesh):
        args = state.trained, state.opt_state, state.frozen, batch_of(0, mesh), np.int32(0)
        compiled = step.lower(*args).compile(QUICKLY)
    return Run(compiled, state.trained, state.opt_state, state.frozen, mesh)


def batch_of(step, mesh):
    return jax.device_put(tiny.batch(ROWS, seed=step), sharding.batch_sharding(mesh))


@functools.cache
def run_of(name, lora):
    return start(make_config(*MESHES[name], lora=lora))


@functools.cache
def losses_of(name, lora):
    run, losses = run_of(name, lora), []
    # Donated with the first step, which `run_of` keeps.
    trained, opt_state = jax.tree.map(lambda x: x.copy(), (run.trained, run.opt_state))
    for i in range(20):
        trained, opt_state, metrics = run.compiled(trained, opt_state, run.frozen, batch_of(i, run.mesh), np.int32(i))
        losses.append(metrics["training_loss"])
    return np.array(jax.device_get(losses))


# --- Losses ---


@pytest.mark.parametrize("lora", [True, SLOW(False)])
@pytest.mark.parametrize("name", ["fsdp", SLOW("fsdp_vocab"), "fsdp_tp", "tp"])
def test_losses_are_those_of_one_device(name, lora):
    one = losses_of("one", lora)
    assert np.ptp(one) > 0.1, "nothing was learned, so nothing is compared"
    np.testing.assert_allclose(losses_of(name, lora), one, rtol=0, atol=1e-5)


# --- Where things lie ---


@pytest.mark.parametrize("name", ["fsdp", "fsdp_tp", "tp"])
def test_nothing_large_lies_whole_on_a_device(name):
    """Frozen and trained leaves and both moments; tp leaves biases, norms and the like."""
    run = run_of(name, True)
    frozen = {n: x for n, x in run.frozen.items() if n != "img/embedding/kernel"}
    for leaf in jax.tree.leaves((run.trained, run.opt_state, frozen)):
        cut = leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
        if name == "fsdp" or leaf.size > DEPTH * WIDTH**2:
            assert cut == 8 or leaf.ndim < 2, leaf.shape
    for n, x in run.trained.items():
        moments = [m for m in jax.tree.leaves(run.opt_state) if m.shape == x.shape]
        assert any(m.sharding == x.sharding for m in moments), n


# --- What is sent ---


class Sent(NamedTuple):
    """A collective operation of a compiled program, of one array.

    kind: e.g. "all-gather". shape: of the result. in_loop: whether it is in a loop over layers.
    backward: whether it is of the backward pass.
    """

    kind: str
    shape: tuple[int, ...]
    in_loop: bool
    backward: bool

    @property
    def size(self):
        return math.prod(self.shape)


_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?([^}\s]*[^},\s])")


def sent(compiled):
    """The `Sent` of a compiled program, in order."""
    computations, calls, bodies = {}, {}, set()
    for line in compiled.as_text().splitlines():
        if line.rstrip().endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            lines = computations[name] = []
            called = calls[name] = set()
        elif line.startswith("  "):
            lines.append(line)
            for found in _CALLED.findall(line):
                called.update(n.strip(" %") for n in found.split(","))
            bodies.update(re.findall(r"\bbody=%?([\w.\-]+)", line))
    looped, todo = set(), list(bodies)
    while todo:
        if (name := todo.pop()) not in looped:
            looped.add(name)
            todo.extend(calls.get(name, ()))
    out = []
    for name, lines in computations.items():
        for line in lines:
            if found := _COLLECTIVE.search(line):
                for dims in re.findall(r"\b[a-z]+\d*\[([\d,]*)\]", found[1]):
                    shape = tuple(map(int, filter(None, dims.split(","))))
                    out.append(Sent(found[2], shape, name in looped, "transpose(" in line))
    return out


def forward(c):
    """The image tower alone, compiled; it takes a tenth of a step's time."""
    setup = Setup(c, mesh=make_mesh(c))
    mesh, model = setup.mesh, setup.model
    params = weights.stored_params(setup.abstract, setup)
    image = jax.ShapeDtypeStruct((ROWS, tiny.RES, tiny.RES, 3), "float32", sharding=sharding.batch_sharding(mesh))
    with sharding.rules(c, mesh):
        embed = jax.jit(lambda p, x: model.apply({"params": p}, x, method="embed_image")[0])
        return embed.lower(unflatten_tree(params), image).compile(QUICKLY)


def gathers_stack(found):
    """Whether the weights of all layers are brought together anywhere."""
    return any(s.kind != "all-reduce" and s.shape[:1] == (DEPTH,) and s.size > 999 for s in found)


def holds_stack(run):
    """Whether a device ever has all layers of a kernel, however it came by them."""
    shapes = {run.frozen[n].shape for n in kernels(run) if "kv_einsum" not in n}
    lists = (",".join(map(str, shape)) for shape in shapes)
    text = run.compiled.as_text()
    return any(f"[{dims}]" in text for dims in lists)


def sends_batch(found):
    """Whether all rows' activations meet on one device in a loop over layers."""
    return any(s.in_loop and ROWS in s.shape for s in found)


def kernels(run):
    """{name: size of one layer's projection} of the frozen kernels in loops."""
    return {
        n: math.prod(x.shape[2 if "gating" in n else 1 :])
        for n, x in run.frozen.items()
        if n.endswith(("/kernel", "/w", "gating_einsum", "linear")) and x.shape[0] == DEPTH
    }


def test_fsdp_gathers_a_layer_at_a_time():
    run = run_of("fsdp", True)
    found = sent(run.compiled)
    assert not gathers_stack(found) and not holds_stack(run) and not sends_batch(found)
    for backward in (False, True):
        gathered = {s.size for s in found if s.in_loop and s.kind == "all-gather" and s.backward == backward}
        assert gathered >= set(kernels(run).values())
    # Gradients are summed layer by layer. On a CPU, XLA makes no reduce-scatters of these.
    reduced = {s.size for s in found if s.in_loop and s.kind in ("all-reduce", "reduce-scatter")}
    factors = {x.size // DEPTH for x in run.trained.values()}
    assert reduced >= factors or reduced >= {n // 8 for n in factors}


def test_one_device_holds_it_all():
    """So that what others don't hold is known to be looked for rightly."""
    run = run_of("one", True)
    assert holds_stack(run) and not sent(run.compiled)


def test_tp_sums_each_sublayer_and_gathers_nothing():
    found = sent(run_of("tp", True).compiled)
    assert {s.kind for s in found} == {"all-reduce"}
    for tokens in (4, 16):  # of the image, and of image and text
        hidden = (ROWS, tokens, WIDTH)
        forward = [s for s in found if s.in_loop and s.shape == hidden and not s.backward]
        assert len(forward) == 2, "one after attention, one after the MLP"
    outside = [s for s in found if not s.in_loop and s.size > 999]
    # Embedded tokens, and the gradient of the logits' input.
    assert [s.shape[-1] for s in outside] == [WIDTH] * 2


def test_fsdp_and_tp_together():
    run = run_of("fsdp_tp", True)
    found = sent(run.compiled)
    assert not gathers_stack(found) and not holds_stack(run) and not sends_batch(found)
    gathered = {s.size for s in found if s.in_loop and s.kind == "all-gather"}
    for name, size in kernels(run).items():  # of each the half that the model axis leaves
        assert (size if "kv_einsum" in name else size // 2) in gathered, name
    for tokens in (4, 16):
        hidden = (ROWS // 4, tokens, WIDTH)
        assert sum(s.in_loop and s.shape == hidden and not s.backward for s in found) == 2


@pytest.mark.slow
def test_fsdp_with_logits_cut_by_vocabulary_leaves_the_table_where_it_is():
    def gathers_table(found):
        return any(s.kind == "all-gather" and s.size == VOCAB * WIDTH for s in found)

    found = sent(run_of("fsdp_vocab", True).compiled)
    assert not gathers_table(found) and not gathers_stack(found) and not sends_batch(found)
    assert gathers_table(sent(run_of("fsdp", True).compiled))


def test_the_checks_see_a_layer_axis_that_is_cut():
    stacks = ".*/(encoderblock|layers)/.*"
    strategy = [(stacks, 'shard_dim(axis="data", dim=0)'), (".*", "replicate")]
    assert gathers_stack(sent(forward(make_config([("data", DEPTH)], strategy))))
    assert not gathers_stack(sent(forward(make_config([("data", DEPTH)], FSDP))))


def test_the_checks_see_a_batch_that_is_gathered():
    """What XLA makes of fsdp when activations are left to it."""
    assert sends_batch(sent(forward(make_config([("data", 8)], FSDP, [], lora=False))))


# --- Answers ---


@functools.cache
def answers(name):
    c = make_config(*MESHES[name], lora=False)
    setup = Setup(c, mesh=make_mesh(c))
    mesh, model = setup.mesh, setup.model
    flat = jax.device_put(random_weights(setup.abstract), setup.shardings)
    batch = tiny.batch(8)
    batch["mask_input"] = (np.arange(13) < 3 + np.arange(8)[:, None] % 5).astype(np.int32)
    batch["mask_ar"] = np.zeros_like(batch["text"])
    batch["text"] = np.maximum(batch["text"], 3)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with sharding.rules(c, mesh):
        out = decode.generate(
            model,
            unflatten_tree(flat),
            batch,
            max_new_tokens=6,
            num_samples=2,
            temperature=0.7,
            eos_token=1,
        )
    return jax.device_get(out)


@pytest.mark.parametrize("name", [SLOW("fsdp"), SLOW("fsdp_vocab"), "fsdp_tp", SLOW("tp")])
def test_answers_are_those_of_one_device(name):
    tokens, logprobs = answers("one")
    assert len(np.unique(tokens)) > 20
    found, their = answers(name)
    np.testing.assert_array_equal(found, tokens)
    np.testing.assert_allclose(their, logprobs, rtol=0, atol=1e-4)


# --- The table ---


def test_table_tells_how_each_leaf_is_cut():
    setup = TrainingSetup.without_data(make_config(*MESHES["fsdp_tp"]))
    table = describe.parameters(setup)
    lines = {line.split()[0]: line for line in table.splitlines()}
    mlp = lines["llm/layers/mlp/gating_einsum"]
    assert mlp.split()[-3:] == ["-,-,data,model", f"{DEPTH * 2 * WIDTH * 320 * 4 // 8:,}", "B"]
    assert "(model=2 doesn't divide K=1)" in lines["llm/layers/attn/kv_einsum/w"]
    per_device = sum(
        math.prod(setup.shardings[n].shard_shape(setup.abstract[n].shape)) * 4 for n in setup.trained_names
    )
    assert f"parameters trained, {per_device:,} bytes of them on each of 8 devices" in table


# --- The programs ---


def test_programs_run_under_the_rules(monkeypatch, tmp_path, tiny_data):
    seen = []

    class Evaluator:
        def run(self, params):
            seen.append(activations.active.value)
            return {}

    def generate(*args, **kw):
        Evaluator().run(None)
        return np.zeros((1, 1, 1)), np.zeros((1, 1, 1))

    c = tiny.config(tiny_data)
    mesh, tok = experiment.make_mesh(c), get_tokenizer("tiny")
    monkeypatch.setattr(train, "_open", lambda *args: {})
    monkeypatch.setattr(train, "Run", lambda *args: types.SimpleNamespace(run=lambda: Evaluator().run(None)))
    monkeypatch.setattr(weights, "load", lambda *args: (None, tok, mesh, None))
    monkeypatch.setattr(experiment, "make_evaluators", lambda *args: {"val": (Evaluator(), None)})
    monkeypatch.setattr(evaluate.tables, "format_table", lambda results: "")
    monkeypatch.setattr(decode, "generate", generate)
    train.train(c, tmp_path)
    evaluate.evaluate(c, "weights", tmp_path)
    predict.predict(c, "weights", np.zeros((32, 32, 3), np.uint8), ["what is it ?"])
    assert seen == [(mesh, (("act_batch", "data"),))] * 3
    assert activations.active.value is None
