"""FLOPs of other models than PaliGemma: class tokens, connectors and untied tables, by XLA's count and by hand."""

import jax
import pytest

from paligemma_med import experiment
from paligemma_med.models import flops, presets
from paligemma_med.training import optim
from paligemma_med.training import step as train_step
from tests import tiny
from tests.models.test_flops import BATCH, CONSTANT, RES, SUPERVISED, count

pytestmark = pytest.mark.usefixtures("optimised_file")

BOTH = dict(depth=2, scan=False)
IMG = dict(width=128, mlp_dim=256, num_heads=2, patch_size=8, **BOTH)
LLM = dict(width=128, mlp_dim=512, num_heads=4, head_dim=32, vocab_size=1024, **BOTH)
SIZES = {
    "medgemma_4b": dict(img=IMG, llm=dict(LLM, num_kv_heads=2, window=16, window_every=2)),
    "llama_clip": dict(img=IMG, llm=dict(LLM, num_kv_heads=2)),
    # One pair of layers, which XLA counts once.
    "bloom_qformer": dict(
        img=IMG,
        llm=dict(LLM, num_kv_heads=4),
        connector=dict(kind="qformer", queries=24, inner=128, depth=2, mlp_dim=256, num_heads=4),
    ),
    "pefomed": dict(img=IMG, llm=dict(LLM, num_kv_heads=4)),
}
BETWEEN = [("(connector|img/head)/.*|.*/lora_[ab]", CONSTANT), (".*", None)]
LORA = [("llm/layers/.*|img/Transformer/.*", dict(rank=8))]


def make(name, schedule, lora=None):
    model = {**presets.PRESETS[name], **SIZES[name]}
    for part in ("img", "llm"):
        model[part] = {**presets.PRESETS[name][part], **SIZES[name][part], "remat_policy": "nothing_saveable"}
    c = tiny.config(model=model, lora=lora, schedule=schedule, supervised_len=SUPERVISED, res=RES)
    model = experiment.make_model(c)
    abstract = experiment.abstract_params(c, model)
    return c, model, abstract, optim.trained_names(c, list(abstract))


def count_by_xla(c, model, abstract, names):
    tx, learning_rate = optim.make(c, names, total_steps=9, num_examples=9, batch_size=BATCH)
    trained = {n: abstract[n] for n in names}
    frozen = {n: x for n, x in abstract.items() if n not in trained}
    batch = {k: jax.ShapeDtypeStruct((BATCH, c.text_len + 1), "int32") for k in ("text", "mask_ar", "mask_loss")}
    batch["image"] = jax.ShapeDtypeStruct((BATCH, RES, RES, 3), "float32")
    batch["image_at"] = jax.ShapeDtypeStruct((BATCH,), "int32")
    step = jax.jit(train_step.make_train_step(c, model, tx, learning_rate))
    step = step.lower(trained, jax.eval_shape(tx.init, trained), frozen, batch, jax.ShapeDtypeStruct((), "int32"))
    return step.compile().cost_analysis()["flops"] / BATCH


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["between", "lora", "all"])
@pytest.mark.parametrize("name", SIZES)
def test_agrees_with_xla(name, schedule):
    schedules = dict(between=(BETWEEN,), lora=(BETWEEN, LORA), all=(CONSTANT,))
    made = make(name, *schedules[schedule])
    found = count(made[0], made[1], made[3])
    assert 0.95 < found.per_example_executed / count_by_xla(*made) < 1.005
    assert found.per_example_attention > 0.05 * found.per_example_model  # it couldn't be forgotten


def test_a_query_transformer_by_hand():
    """Two products of each second layer read the tower's patches and class token; all others read queries."""
    q, w, f, d, e, text, logits = 24, 128, 256, 128, 128, 9, 4
    patches = (RES // 8) ** 2
    seen, tokens = patches + 1, q + text
    _, model, _, _ = make("bloom_qformer", CONSTANT)
    tower = 2 * (4 * d * d + 2 * d * 256) * seen + 3 * 8 * 8 * d * patches
    cross = 2 * d * w * seen
    own = (2 * 4 * w * w + 2 * w * w + 2 * 2 * w * f + w * e) * q
    decoder = 2 * (4 * e * e + 2 * e * 512) * tokens + 1024 * e * logits
    forward = flops.count_pass(model, res=RES, text_len=text, logits=logits)
    assert forward.per_example_model == 2 * (tower + cross + own + decoder)
    pairs = 2 * seen**2 * d + 2 * q * q * w + q * seen * w + 2 * tokens**2 * e
    assert forward.per_example_attention == 4 * pairs

    def step(trained):
        return flops.count(model, trained, res=RES, text_len=text, supervised_len=logits)

    # Only what reads the tower needs no gradient for it, unless the tower is trained.
    queries = step(["connector/queries"])
    assert queries.per_example_model == 2 * (tower + cross) + 4 * (own + decoder)
    assert queries.per_example_attention == 4 * (pairs + 2 * (pairs - 2 * seen**2 * d))
    below = step(["img/Transformer/encoder_norm/scale"])
    assert below.per_example_model == 2 * tower + 4 * (cross + own + decoder)
    # Nothing of a layer is kept: its products are made again, but for the decoder's last, and so are scores.
    again = cross + own - w * e * q + 2 * (4 * e * e + e * 512) * tokens
    assert queries.per_example_recompute == 2 * again + 6 * (pairs - 2 * seen**2 * d)


def test_the_class_token_and_a_table_of_its_own():
    """The tower's layers read it, its head doesn't; the table that only embeds is in no product."""
    _, model, _, _ = make("llama_clip", CONSTANT)
    patches, text, logits, d = (RES // 8) ** 2, 9, 4, 128
    tower = 2 * (4 * d * d + 2 * d * 256) * (patches + 1) + (3 * 8 * 8 * d + d * d) * patches
    decoder = 2 * (2 * d * d + 2 * d * 64 + 3 * d * 512) * (patches + text) + 1024 * d * logits
    found = flops.count_pass(model, res=RES, text_len=text, logits=logits)
    assert found.per_example_model == 2 * (tower + decoder)
    assert found.per_example_attention == 4 * 2 * d * ((patches + 1) ** 2 + (patches + text) ** 2)
