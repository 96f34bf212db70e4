"""Adapters trained here for 20 steps give PyTorch's greedy answers: through the converter, transformers and PEFT.

The image is read by our tower and connector in each case but Gemma 3's, which transformers has whole; what they give is
put among the embeddings of the text by hand.
"""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft as reference
import pytest
import torch
import transformers

from paligemma_med import decode, experiment
from paligemma_med.checkpoints import hf, npz, workdir
from paligemma_med.models import presets, vlm
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.training import optim
from paligemma_med.training import step as train_step
from tests import tiny
from tests.models.test_presets import TINY
from tools.convert_checkpoint import convert

STEPS, ROWS, NEW, VOCAB = 20, 4, 6, 64
PROMPTS, AT = np.array([3, 5, 4, 5]), np.array([2, 1, 0, 3], np.int32)
SIZES = dict(width=32, depth=2, num_heads=4, head_dim=8, vocab_size=VOCAB, remat_policy="none")
MODELS = {
    "llama_clip": (
        dict(SIZES, mlp_dim=48, num_kv_heads=2),
        [("llm/layers/attn/.*|img/Trans.*(query|value)/kernel", 4)],
    ),
    "bloom_qformer": (dict(SIZES, mlp_dim=128, num_kv_heads=4), [("llm/layers/attn/qkv/kernel", 4)]),
    "medgemma_4b": (
        dict(SIZES, mlp_dim=48, num_kv_heads=2, window=6),
        [("connector/.*", None), (".*Dense_.*|llm/layers/.*", 4)],
    ),
}


def config_of(name):
    model = {**presets.PRESETS[name], **TINY[name]}
    if name == "bloom_qformer":
        model["connector"] = {**presets.PRESETS[name]["connector"], **TINY[name]["connector"]}
    sizes, rules = MODELS[name]
    model["img"] = dict(TINY[name]["img"], variant="mu/4", remat_policy="none")
    model["llm"] = {**TINY[name]["llm"], **sizes}
    factors = [(regex, rank and dict(rank=rank, alpha=8)) for regex, rank in rules]
    trained = dict(decay_type="constant")
    schedule = [(".*lora_[ab]|img/head/.*|connector/.*", trained), (".*", None)]
    return tiny.config("/no/such/folder", model=model, lora=factors, schedule=schedule, lr=2e-2)


def batch_of():
    """Causal throughout, the image at unlike places in the prompts, an answer for each."""
    rng = np.random.default_rng(1)
    length = PROMPTS.max() + NEW
    place = np.arange(length)[None]
    answer = (place >= PROMPTS[:, None]) & (place < PROMPTS[:, None] + NEW)
    return {
        "image": rng.uniform(-1, 1, (ROWS, tiny.RES, tiny.RES, 3)).astype(np.float32),
        "text": np.where(place < PROMPTS[:, None] + NEW, rng.integers(4, VOCAB, (ROWS, length)), 0).astype(np.int32),
        "mask_ar": np.ones((ROWS, length), np.int32),
        "mask_loss": answer.astype(np.int32),
        "image_at": AT,
    }


def train(name, folder):
    """(model, its parameters after training as {name: array}); base.npz and run/ are written."""
    c = config_of(name)
    model = experiment.make_model(c)
    rng = np.random.default_rng(2)
    flat = {}
    for path, x in experiment.abstract_params(c, model).items():
        inputs = x.shape[-2] if len(x.shape) > 1 else 1
        norm = path.endswith("scale") and name != "medgemma_4b" or path.startswith("img") and path.endswith("scale")
        flat[path] = (0.6 * rng.normal(size=x.shape) / inputs**0.5 + norm).astype(np.float32)
        if path.endswith("lora_b"):
            flat[path] *= 0
    base = {n: x for n, x in flat.items() if not lora.is_factor(n)}
    names = optim.trained_names(c, list(flat))
    tx, rate = optim.make(c, names, total_steps=STEPS, num_examples=STEPS * ROWS, batch_size=ROWS)
    trained = {n: jnp.asarray(flat[n]) for n in names}
    frozen = {n: x for n, x in flat.items() if n not in trained}
    step = jax.jit(train_step.make_train_step(c, model, tx, rate))
    opt_state, losses = tx.init(trained), []
    for i in range(STEPS):
        trained, opt_state, metrics = step(trained, opt_state, frozen, batch_of(), i)
        losses.append(float(metrics["training_loss"]))
    assert losses[-1] < 0.8 * losses[0]
    own = {n: np.asarray(x) for n, x in trained.items()}
    npz.save_npz(folder / "base.npz", unflatten_tree(base))
    (folder / "run").mkdir()
    saved = dict(model=c.model.to_dict(), model_init=str(folder / "base.npz"), lora=c.lora)
    (folder / "run" / "config.json").write_text(json.dumps(saved))
    with workdir.Checkpoints(folder / "run") as checkpoints:
        checkpoints.save(STEPS, own, {})
    return model, {**frozen, **own}, base


def our_answers(model, flat):
    batch, place = batch_of(), np.arange(PROMPTS.max())[None]
    prompt = place < PROMPTS[:, None]
    text = np.where(prompt, batch["text"][:, : PROMPTS.max()], 0)
    batch = dict(image=batch["image"], image_at=AT, text=text, mask_ar=np.ones_like(text), mask_input=prompt)
    tokens, _ = decode.generate(model, unflatten_tree(flat), batch, max_new_tokens=NEW, eos_token=-1)
    return np.asarray(tokens)[:, 0].tolist()


def greedy(logits_of, ids, at):
    """NEW tokens after a prompt, each from a whole pass; the best must be well ahead of the second."""
    out = []
    for _ in range(NEW):
        with torch.no_grad():
            best = torch.topk(logits_of([*ids, *out], at)[:VOCAB], 2)
        assert best.values[0] - best.values[1] > 1e-4 * best.values[0].abs()
        out.append(int(best.indices[0]))
    return out


def spliced(model, zimg):
    """What computes the last logits of text with an image's embeddings in it."""
    table = model.get_input_embeddings()

    def logits_of(ids, at):
        text = table(torch.tensor([ids]))
        x = torch.cat([text[:, :at], zimg[None], text[:, at:]], dim=1)
        return model(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long)).logits[0, -1]

    return logits_of


def whole(model, image):
    """The same of Gemma 3, which reads pixels."""
    pixels = torch.tensor(image.transpose(2, 0, 1)[None])

    def logits_of(ids, at):
        ids = torch.tensor([[*ids[:at], *[VOCAB] * 4, *ids[at:]]])
        types = (ids == VOCAB).long()
        return model(
            input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids), pixel_values=pixels
        ).logits[0, -1]

    return logits_of


def load(base, adapter):
    kind = (
        transformers.AutoModelForImageTextToText
        if (base / "preprocessor_config.json").exists()
        else transformers.AutoModelForCausalLM
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.PeftModel.from_pretrained(kind.from_pretrained(base, attn_implementation="eager"), adapter)
        found = model.load_adapter(adapter, "again")
    assert not found.missing_keys and not found.unexpected_keys
    return model.eval()


@pytest.mark.parametrize(
    "name", ["llama_clip", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bloom_qformer", "medgemma_4b"))]
)
def test_trained_adapters_answer_alike(name, tmp_path):
    model, flat, base = train(name, tmp_path)
    ours, run = our_answers(model, flat), str(tmp_path / "run")
    assert ours != our_answers(
        model, {**flat, **{n: np.zeros_like(x) for n, x in flat.items() if n.endswith("lora_b")}}
    )
    batch = batch_of()
    if name == "medgemma_4b":
        # The base with the trained connector, which PEFT knows nothing of, and the adapter on top.
        plain = {**base, **{n: flat[n] for n in base}}
        npz.save_npz(tmp_path / "plain.npz", unflatten_tree(plain))
        saved = dict(model=config_of(name).model.to_dict())
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "config.json").write_text(json.dumps(dict(saved, model_init=str(tmp_path / "plain.npz"))))
        with workdir.Checkpoints(tmp_path / "plain") as checkpoints:
            checkpoints.save(1, {"connector/norm/scale": flat["connector/norm/scale"]}, {})
        convert(str(tmp_path / "plain"), tmp_path / "hf", "hf")
        convert(run, tmp_path / "peft", "peft")
        theirs = load(tmp_path / "hf", tmp_path / "peft")
        logits_of = [whole(theirs, image) for image in batch["image"]]
    else:
        convert(run, tmp_path / "hf", "hf")
        llm = {n: x for n, x in base.items() if n.startswith("llm/")}
        hf.save_hf(tmp_path / "base", unflatten_tree(llm), llm=config_of(name).model.llm.to_dict())
        theirs = load(tmp_path / "base", tmp_path / "hf" / "decoder")
        embed = functools.partial(model.apply, {"params": unflatten_tree(flat)}, method=vlm.Model.embed_image)
        zimg = np.asarray(jax.jit(lambda image: embed(image)[0])(batch["image"]))
        logits_of = [spliced(theirs, torch.tensor(x)) for x in zimg]
    want = [
        greedy(f, row[:n].tolist(), at) for f, row, n, at in zip(logits_of, batch["text"], PROMPTS, AT, strict=True)
    ]
    assert ours == want
