"""Training agrees with PyTorch: step by step with peft and AdamW, and in the answers afterwards.

The first tests take the same steps on both sides from the same weights and batch. The last one
trains adapters as a user would, hands base and adapters to PyTorch as files, and asks both.
"""

import copy
import functools
import warnings

import jax
import ml_collections
import numpy as np
import peft
import pytest
import torch
import transformers

from configs import common, tiny_base
from data_prep import build
from paligemma_med import checkpoints, decode, experiment, input_pipeline, train
from paligemma_med.checkpoints.hf import families, paligemma
from paligemma_med.models import lora_targets
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.training import optim
from paligemma_med.training import step as train_step
from tests.checkpoints import adapters
from tests.models import hf as models

STEPS, LR, WD = 5, 1e-2, 0.2
TOLERANCE = 1e-4
ATTENTION = [
    ("img/.*MultiHead.*/kernel|llm/layers/attn/.*", dict(rank=3, alpha=12)),
]


def our_steps(name, model, params, regex, **kw):
    """[(loss, {name: array} of what matches `regex`, after the step), …] of our train step."""
    batch = train_batch(name)
    flat = flatten_tree(params)
    config = ml_collections.ConfigDict(
        dict(
            optax_name="scale_by_adam",
            lr=LR,
            loss_norm="token",
            # Decay is of the parameter itself here, and of lr times the parameter in PyTorch.
            wd=LR * WD,
            wd_mults=[(".*", 1.0)],
            schedule=[(regex, dict(decay_type="constant")), (".*", None)],
        )
    )
    config.update(kw)
    names = optim.trained_names(config, list(flat))
    tx, lr = optim.make(config, names, total_steps=STEPS, num_examples=9, batch_size=3)
    step = jax.jit(train_step.make_train_step(config, model, tx, lr))
    trained = {n: flat.pop(n) for n in names}
    state, out = tx.init(trained), []
    for i in range(STEPS):
        trained, state, metrics = step(trained, state, flat, batch, i)
        out.append((float(metrics["training_loss"]), jax.device_get(trained)))
    return out


def train_batch(name):
    """The batch of a case as the train pp makes it."""
    batch = models.reference(name)[4]
    answer = batch["valid"] & (batch["mask_ar"] == 1)
    assert len(set(answer.sum(1))) > 1  # of different lengths, or all norms of the loss are alike
    return {**{k: batch[k] for k in ("image", "text", "mask_ar")}, "mask_loss": answer.astype("i4")}


def their_steps(name, model, parameters, read, clip=None):
    """[(loss, read(), after the step), …] of torch.optim.AdamW on `parameters`."""
    case, _, _, _, batch = models.reference(name)
    inputs = models.torch_inputs(case, batch)
    answer = train_batch(name)["mask_loss"]
    labels = np.full(inputs["input_ids"].shape, -100)
    labels[:, -answer.shape[1] :] = np.where(answer, batch["text"], -100)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WD)
    out = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs, labels=torch.tensor(labels)).loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        out.append((loss.item(), read()))
    return out


def assert_same_steps(ours, theirs, start):
    assert len(ours) == len(theirs) == STEPS
    for (our_loss, our), (their_loss, their) in zip(ours, theirs):
        assert our_loss == pytest.approx(their_loss, abs=TOLERANCE, rel=0)
        assert our.keys() == their.keys()
        for n, x in our.items():
            np.testing.assert_allclose(x, their[n], rtol=0, atol=TOLERANCE, err_msg=n)
    # The bound means something only if much more than it has happened.
    assert ours[0][0] - ours[-1][0] > 0.02
    for n, x in start.items():
        assert abs(ours[-1][1][n] - x).max() > 100 * TOLERANCE, n


def factors_of(theirs, targets, start):
    """{our name: array} of the factors of a PEFT model, shaped as those of `start`."""
    modules = {
        paligemma.canonical(n.removeprefix("base_model.model.")): m
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    out = {}
    for target in targets:
        for n, factor in zip(lora_targets.factor_names([target]), ("lora_A", "lora_B")):
            layers = range(len(start[n]) if target.stacked else 1)
            found = [modules[families.modules_of(paligemma)[target].replace("{i}", str(i))] for i in layers]
            found = [getattr(m, factor)["default"].weight.detach().numpy().T for m in found]
            out[n] = np.stack(found).reshape(start[n].shape)
    return out


@pytest.mark.parametrize(
    "name, rules, fresh, clip, accum",
    [
        ("mqa", ATTENTION, True, None, 1),
        ("mqa", ATTENTION, False, 0.05, 3),
        pytest.param("gemma2", adapters.ALL, False, None, 1, marks=pytest.mark.slow),
        pytest.param("gemma2_mha", adapters.MIXED, True, 0.05, 1, marks=pytest.mark.slow),
    ],
)
def test_steps_of_adapters_equal_peft(name, rules, fresh, clip, accum, tmp_path):
    case, base, _, params, _ = models.reference(name)
    made = adapters.random_adapter(name, rules)
    if fresh:
        made = checkpoints.Adapter(made.specs, {t: (a, np.zeros_like(b)) for t, (a, b) in made.factors.items()})
    img, llm = (dict(variant=None, **case[k]) for k in ("img", "llm"))
    model, params = checkpoints.apply_adapter(img, llm, params, made)
    start = {n: x for n, x in flatten_tree(params).items() if lora.is_factor(n)}
    ours = our_steps(name, model, params, ".*/lora_[ab]", grad_clip_norm=clip, grad_accum_steps=accum)

    checkpoints.save_adapter(tmp_path / "adapter", made)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter", is_trainable=True).eval()
    read = functools.partial(factors_of, theirs, made.specs, start)
    for n, x in read().items():
        np.testing.assert_array_equal(x, start[n])
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(x.size for x in start.values())
    assert_same_steps(ours, their_steps(name, theirs, trained, read, clip), start)


def test_steps_of_the_head_equal_adamw():
    """Stage 1: the projection alone is trained."""
    name = "mqa"
    _, base, model, params, _ = models.reference(name)
    theirs = copy.deepcopy(base).requires_grad_(False)
    linear = theirs.model.multi_modal_projector.linear.requires_grad_(True)
    start = {n: x for n, x in flatten_tree(params).items() if n.startswith("img/head/")}

    def read():
        return {
            "img/head/kernel": linear.weight.detach().numpy().T.copy(),
            "img/head/bias": linear.bias.detach().numpy().copy(),
        }

    ours = our_steps(name, model, params, "img/head/.*")
    assert_same_steps(ours, their_steps(name, theirs, list(linear.parameters()), read), start)


@pytest.mark.parametrize("change", [dict(loss_norm="example"), dict(wd=0.0), dict(optax=dict(b1=0.8))], ids=str)
def test_the_comparison_sees_other_settings(change):
    name = "mqa"
    _, _, model, params, _ = models.reference(name)
    one = our_steps(name, model, params, "img/head/.*")[-1][1]
    other = our_steps(name, model, params, "img/head/.*", **change)[-1][1]
    assert abs(one["img/head/kernel"] - other["img/head/kernel"]).max() > 5 * TOLERANCE


# ---- A whole run, carried over to PyTorch in files

QUESTIONS = 50


def lora_config(data_dir):
    """Twenty steps of adapters in both towers on the phantoms, from the tiny base."""
    c = ml_collections.ConfigDict()
    c.seed, c.res, c.text_len, c.tokenizer = 0, tiny_base.RES, 28, tiny_base.TOKENIZER
    c.model, c.model_init = tiny_base.MODEL, tiny_base.BASE
    c.lora = [
        ("img/Transformer/.*MultiHead.*/kernel", dict(rank=8, alpha=32, dropout=0.05)),
        ("img/head/kernel", dict(rank=4, alpha=8, rslora=True)),
        ("llm/layers/.*", dict(rank=8, alpha=32, dropout=0.05)),
    ]
    c.schedule = [(".*/lora_[ab]", dict(decay_type="constant")), (".*", None)]
    c.input = dict(
        data=dict(name="phantom", split="train", data_dir=str(data_dir)),
        pp=common.train_pp(c.res, c.text_len, c.tokenizer),
        batch_size=32,
        num_threads=1,
    )
    c.total_steps = 20
    c.optax_name, c.lr, c.grad_clip_norm = "scale_by_adam", 3e-3, 1.0
    return c


def ask_torch(model, batch, max_new_tokens):
    """Greedy answers, lists of tokens before EOS; prompts of one length go together, unpadded."""
    lengths, out = batch["mask_input"].sum(1), {}
    vocab = model.config.text_config.vocab_size
    image_token = model.config.image_token_id
    assert image_token < vocab
    for length in sorted(set(lengths)):
        rows = np.flatnonzero(lengths == length)
        text = torch.tensor(batch["text"][rows, :length], dtype=torch.long)
        image = torch.full((len(rows), model.config.text_config.num_image_tokens), image_token)
        ids = torch.cat([image, text], 1)
        with torch.no_grad():
            answers = model.generate(
                input_ids=ids,
                token_type_ids=torch.zeros_like(ids),
                do_sample=False,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pixel_values=torch.tensor(batch["image"][rows].transpose(0, 3, 1, 2)),
            )[:, ids.shape[1] :]
        out |= {row: until_eos(answer) for row, answer in zip(rows, answers.tolist())}
    return [out[row] for row in range(len(lengths))]


def ask_ours(model, params, batch, max_new_tokens, eos_token):
    tokens, _ = decode.generate(model, params, batch, max_new_tokens=max_new_tokens, eos_token=eos_token)
    return [until_eos(row, eos_token) for row in np.asarray(tokens)[:, 0].tolist()]


def until_eos(tokens, eos_token=1):
    return tokens[: tokens.index(eos_token)] if eos_token in tokens else tokens


@pytest.mark.slow
def test_what_was_trained_here_answers_alike_in_torch(tmp_path):
    build.build("phantom", data_dir=tmp_path / "data", num_images=(60, 4, 16))
    config, workdir = lora_config(tmp_path / "data"), str(tmp_path / "run")
    train.train(config, workdir)
    model = experiment.make_model(config)
    tok = experiment.make_tokenizer(config, model)
    params = checkpoints.load_params(workdir)

    base = checkpoints.remove_adapter(params)
    kw = {k: v.to_dict() for k, v in config.model.items()}
    checkpoints.save_hf(tmp_path / "base", base, **kw)
    made = checkpoints.extract_adapter(model, params)
    checkpoints.save_adapter(tmp_path / "adapter", made, base_model=str(tmp_path / "base"))
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    ).eval()

    inputs = input_pipeline.evaluation(
        dict(name="phantom", split="test", data_dir=str(tmp_path / "data")),
        common.eval_pp(config.res, config.text_len, config.tokenizer),
        QUESTIONS,
    )
    batch, rows = next(iter(inputs))
    batch = jax.device_get(batch)
    assert len(rows) == QUESTIONS and batch["_mask"].all()
    ours_before = ask_ours(model.clone(lora=()), base, batch, 12, tok.eos_token)
    ours = ask_ours(model, params, batch, 12, tok.eos_token)
    assert ask_torch(theirs, batch, 12) == ours_before
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert ask_torch(theirs, batch, 12) == ours
    # Neither one answer to all, nor the base's answers again (measured: 7 of them, 31 changed).
    assert len(set(map(tuple, ours))) >= 3
    changed = sum(a != b for a, b in zip(ours, ours_before))
    assert changed >= QUESTIONS // 4
