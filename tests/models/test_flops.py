"""FLOPs of a step: against XLA's own count of the compiled program, and against numbers by hand."""

import types

import jax
import pytest

from paligemma_med import experiment
from paligemma_med.decode.generate import _generate
from paligemma_med.models import flops, paligemma
from paligemma_med.training import optim
from paligemma_med.training import step as train_step
from tests import tiny

pytestmark = pytest.mark.usefixtures("optimised_file")

CONSTANT = dict(decay_type="constant")
HEAD = [("img/head/.*", CONSTANT), (".*", None)]
FACTORS = [(".*/lora_[ab]", CONSTANT), (".*", None)]
LORA = [("img/Transformer/.*|llm/layers/.*", dict(rank=8))]
BATCH, RES, SUPERVISED = 4, 64, 12


def make(schedule, lora=None, policy="none", depth=2, **llm):
    """(config, model, abstract parameters, names of the trained ones) of an unrolled model that is
    wide enough for its products to outweigh the rest."""
    both = dict(depth=depth, scan=False, remat_policy=policy)
    model = dict(
        img=dict(width=128, mlp_dim=256, num_heads=2, patch_size=8, **both),
        llm=dict(
            width=128,
            mlp_dim=512,
            num_heads=4,
            num_kv_heads=1,
            head_dim=32,
            vocab_size=1024,
            **both,
            **llm,
        ),
    )
    c = tiny.config(model=model, lora=lora, schedule=schedule, supervised_len=SUPERVISED, res=RES)
    model = experiment.make_model(c)
    abstract = experiment.abstract_params(c, model)
    return c, model, abstract, optim.trained_names(c, list(abstract))


def count(c, model, names, **kw):
    kw = dict(res=c.res, text_len=c.text_len, supervised_len=SUPERVISED) | kw
    return flops.count(model, names, **kw)


def count_by_xla(c, model, abstract, names):
    """FLOPs of one example in the compiled step; loops are unrolled, or XLA counts them once."""
    tx, learning_rate = optim.make(c, names, total_steps=9, num_examples=9, batch_size=BATCH)
    trained = {n: abstract[n] for n in names}
    frozen = {n: x for n, x in abstract.items() if n not in trained}
    length = (BATCH, c.text_len + 1)
    batch = {k: jax.ShapeDtypeStruct(length, "int32") for k in ("text", "mask_ar", "mask_loss")}
    batch["image"] = jax.ShapeDtypeStruct((BATCH, RES, RES, 3), "float32")
    step = jax.jit(train_step.make_train_step(c, model, tx, learning_rate))
    step = step.lower(trained, jax.eval_shape(tx.init, trained), frozen, batch, jax.ShapeDtypeStruct((), "int32"))
    return step.compile().cost_analysis()["flops"] / BATCH


def case(*args, slow=True, id, **kw):  # noqa: A002
    return pytest.param(args, kw, id=id, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    "args, kw",
    [
        case(HEAD, policy="nothing_saveable", slow=False, id="head, remat"),
        case(FACTORS, LORA, id="lora"),
        case(FACTORS, LORA, policy="nothing_saveable", id="lora, remat"),
        case(FACTORS, LORA, policy="dots_with_no_batch_dims_saveable", id="lora, dots kept"),
        case(CONSTANT, id="all"),
        case(CONSTANT, policy="nothing_saveable", post_norms=True, id="all, remat, norms"),
        case([("llm/embedder/.*", CONSTANT), (".*", None)], id="embedder"),
    ],
)
def test_agrees_with_xla(args, kw):
    made = make(*args, **kw)
    found, of_xla = count(made[0], made[1], made[3]), count_by_xla(*made)
    # Where nothing stands between, XLA merges what is made again with what was made before.
    merged = found.per_example_recompute if "policy" not in kw else 0
    # What is left out (norms, softmax, the optimizer) is 2 to 3 % at this width.
    assert 0.95 < (found.per_example_executed - merged) / of_xla < 1.0
    left_out = ["per_example_model", "per_example_attention"]
    assert all(getattr(found, k) > 0.05 * of_xla for k in left_out)  # neither could be forgotten


def test_convolutions_of_a_stem_count_at_their_own_resolution():
    both = dict(depth=1, remat_policy="none")
    img = dict(width=8, mlp_dim=16, num_heads=2, patch_size=16, **both)
    llm = dict(variant="gemma_mu", **both)
    counts = []
    for stem in (0, 6):
        model = experiment.make_model(tiny.config(model=dict(img=dict(img, stem=stem), llm=llm), res=RES))
        counts.append(flops.count_pass(model, res=RES, text_len=5, logits=1).per_example_model)
    patches = (RES // 16) ** 2
    stem = 9 * 3 * 6 * (RES // 2) ** 2 + 9 * 6 * 6 * (RES // 4) ** 2 + 4 * 4 * 6 * 8 * patches
    assert counts[1] - counts[0] == 2 * (stem - 16 * 16 * 3 * 8 * patches)


def test_four_and_six_per_weight_and_token():
    """Counted by hand, for a model whose sizes are all different."""
    sizes = dict(img=2 * (4 * 8 * 8 + 2 * 8 * 16), patch=3 * 16 * 16 * 8, head=8 * 10)
    sizes |= dict(llm=3 * (10 * 12 * 2 + 10 * 4 * 2 + 3 * 10 * 20), table=1024 * 10)
    both = dict(remat_policy="none")
    model = dict(
        img=dict(width=8, depth=2, mlp_dim=16, num_heads=2, patch_size=16, **both),
        llm=dict(
            width=10,
            depth=3,
            mlp_dim=20,
            num_heads=3,
            num_kv_heads=1,
            head_dim=4,
            vocab_size=1024,
            **both,
        ),
    )
    patches, text, logits = 4, tiny.TEXT_LEN, 7
    tokens = patches + text

    def found(schedule, lora=None):
        c = tiny.config(model=model, schedule=schedule, lora=lora)
        m = experiment.make_model(c)
        names = optim.trained_names(c, list(experiment.abstract_params(c, m)))
        return flops.count(m, names, res=c.res, text_len=text, supervised_len=logits)

    below = (sizes["img"] + sizes["patch"]) * patches
    above = sizes["llm"] * tokens + sizes["table"] * logits
    head = sizes["head"] * patches
    assert found(HEAD).per_example_model == 2 * below + 4 * head + 4 * above
    everything = 6 * below - 2 * sizes["patch"] * patches + 6 * head + 6 * above
    assert found(CONSTANT).per_example_model == everything
    # Factors of rank 5 on q (10 → 3 heads of 4) and on the head (8 → 10).
    on_q = found(FACTORS, [("llm/layers/attn/q_einsum/w", dict(rank=5))])
    factors = 6 * 3 * 5 * (10 + 12) * tokens
    assert on_q.per_example_model == 2 * below + 2 * head + 4 * above + factors
    on_head = found(FACTORS, [("img/head/kernel", dict(rank=5))])
    factors = (4 * 8 * 5 + 6 * 5 * 10) * patches  # nothing below the first is trained
    assert on_head.per_example_model == 2 * below + 2 * head + 4 * above + factors
    attention = 4 * 2 * 8 * patches**2, 4 * 3 * 12 * tokens**2
    assert found(HEAD).per_example_attention == attention[0] + 3 * attention[1]
    assert found(CONSTANT).per_example_attention == 3 * sum(attention)
    # Whatever is kept, scores are made again for the backward pass.
    assert found(CONSTANT).per_example_recompute == sum(attention) // 2

    # Without a backward pass: 2 each. Two answers of four tokens read six tokens behind the prompt.
    m = experiment.make_model(tiny.config(model=model))
    forward = flops.count_pass(m, res=32, text_len=text, logits=logits)
    assert forward.per_example_model == 2 * (below + head + above)
    assert forward.per_example_attention == sum(attention)
    answers = flops.count_answers(m, res=32, prompt_len=text, samples=2, tokens=4)
    above = sizes["llm"] * (tokens + 6) + sizes["table"] * (1 + 6)
    assert answers.per_example_model == 2 * (below + head + above)
    seen = 2 * (3 * tokens + 1 + 2 + 3)
    assert answers.per_example_attention == sum(attention) + 4 * 3 * 12 * seen


@pytest.mark.parametrize("chunk", [None, 4])
def test_weights_are_read_once_a_product(chunk):
    """By hand: once forward, once for the gradient of the input, once more where products are computed again."""
    c, model, abstract, names = make(HEAD, policy="nothing_saveable")
    stored = {n: 2 * x.size for n, x in abstract.items()}
    sizes = dict(res=c.res, text_len=c.text_len, supervised_len=SUPERVISED, loss_chunk=chunk)
    found = flops.weight_reads(model, names, stored, **sizes)
    d, f = 128, 512  # of the decoder; the tower's MLPs are half as wide
    tower = 2 * (4 * d * d + 2 * d * f // 2) + 3 * 8 * 8 * d + d * d  # below all that is trained
    decoder = 2 * (d * d * 2 + d * 32 * 2 + 3 * d * f)
    last = 2 * d * f  # a block's output is kept by the next one
    assert found == 2 * (tower + 3 * decoder - last + (3 if chunk else 2) * 1024 * d)


def test_a_norm_at_the_end_of_the_decoders_blocks_is_not_the_towers():
    """It asks for the block's last product, which is then made again: the decoder's, not the tower's."""
    (c, model, _, names), plain = (make(CONSTANT, policy="nothing_saveable", post_norms=x) for x in (True, False))
    more, less = (count(*m).per_example_recompute for m in ((c, model, names), (plain[0], plain[1], plain[3])))
    tokens = (RES // 8) ** 2 + c.text_len
    assert more - less == 2 * 512 * 128 * 2 * tokens


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 3])
def test_answers_agree_with_xla(samples):
    """Of two tokens: XLA counts a loop's body once, and the second token is one turn of it."""
    c, model, _, _ = make(HEAD)
    abstract = paligemma.abstract_params(model, image_size=RES)
    text = jax.ShapeDtypeStruct((BATCH, 16), "int32")
    batch = dict(text=text, mask_ar=text, mask_input=text)
    batch["image"] = jax.ShapeDtypeStruct((BATCH, RES, RES, 3), "float32")
    batch["row_id"] = jax.ShapeDtypeStruct((BATCH,), "uint32")
    batch["skip"] = jax.ShapeDtypeStruct((BATCH,), bool)
    one = jax.ShapeDtypeStruct((), "float32")
    lowered = _generate.lower(
        model,
        abstract,
        batch,
        jax.eval_shape(lambda: jax.random.key(0)),
        one,
        one,
        one,
        jax.ShapeDtypeStruct((), "int32"),
        max_new_tokens=2,
        num_samples=samples,
        greedy=True,
        text_len=16,
    )
    of_xla = lowered.compile().cost_analysis()["flops"] / BATCH
    found = flops.count_answers(model, res=RES, prompt_len=16, samples=samples, tokens=2)
    assert 0.95 < found.per_example_executed / of_xla < 1.0


def test_logits_cost_by_supervised_positions():
    c, model, _, names = make(HEAD)
    a, b = (count(c, model, names, supervised_len=n).per_example_model for n in (4, 5))
    assert b - a == 4 * 1024 * 128
    whole = count(c, model, names, supervised_len=None)
    assert whole == count(c, model, names, supervised_len=c.text_len)
    assert whole == count(c, model, names, supervised_len=10 * c.text_len)


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A30", 165.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v4", 275.0),
        ("NVIDIA A300", None),
        ("cpu", None),
        ("NVIDIA of next year", None),
    ],
)
def test_peaks(kind, tera):
    device = types.SimpleNamespace(device_kind=kind)
    assert flops.peak(device) == (tera and pytest.approx(tera * 1e12))
    assert flops.peak(device, 12.5) == 12.5e12
