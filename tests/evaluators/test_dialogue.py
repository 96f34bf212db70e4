"""Dialogues: which questions, what the prompts hold, and that an image is encoded once.

Most tests answer in the model's place, by a function of the prompt; the last one has a model.
"""

import json
import types

import jax
import numpy as np
import pytest

from configs import common
from paligemma_med import decode
from paligemma_med.evaluation import results
from paligemma_med.evaluators import dialogue, vqa
from paligemma_med.metrics import scoring, tables
from paligemma_med.models import paligemma
from paligemma_med.parallel import sharding
from paligemma_med.pp import get_preprocess_fn
from paligemma_med.pp.tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("tiny")
CONFIG = types.SimpleNamespace(res=8, tokenizer="tiny")
SECTION = common.dialogue_eval(CONFIG, "x", "test", turns=3, text_len=96, max_new_tokens=8)
PP = {k: SECTION[k] for k in ("prompt_pp", "history_pp")}
KEYS = ("question_id", "image_id", "question", "answer", "answer_type")
TRUTH = {"modality": "CT", "plane": "axial", "organ": "liver", "normal": "yes"}


def row(i, image_id, about):
    return dict(
        question_id=f"q{i}",
        image_id=image_id,
        question=f"What {about}, {i}?",
        answer=TRUTH[about],
        answer_type="OPEN",
    )


# Six questions on the first image, two on the second, four on the third.
ABOUTS = [
    "modality",
    "plane",
    "organ",
    "normal",
    "plane",
    "organ",
    "modality",
    "plane",
    "organ",
    "normal",
    "modality",
    "plane",
]
ROWS = [row(i, "aaaaaabbcccc"[i], about) for i, about in enumerate(ABOUTS)]
VALUES = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
EVAL_PP = common.eval_pp(8, 32, "tiny", keep=()).partition("strfmt")
TEXT_PP = get_preprocess_fn("strfmt" + EVAL_PP[2].replace('"image", ', "").replace("'image', ", ""))


def make_inputs(rows=ROWS, batch_size=2):
    out = []
    for start in range(0, len(rows), batch_size):
        valid = rows[start : start + batch_size]
        filled = valid + valid[:1] * (batch_size - len(valid))
        texts = [TEXT_PP(dict(r)) for r in filled]
        image = [np.full((8, 8, 3), VALUES[r["image_id"]], np.float32) for r in filled]
        arrays = {k: np.stack([t[k] for t in texts]) for k in ("text", "mask_ar", "mask_input")}
        valid_mask = np.arange(batch_size) < len(valid)
        out.append((arrays | dict(image=np.stack(image), _mask=valid_mask), valid))
    return out


def answer_with(monkeypatch, answer, samples=1, dies_at=None):
    """`answer(prompt, pixel, sample) -> str` in place of the model. → (prompts, images encoded)."""
    prompts, encoded = [], []

    def encode_images(model, params, image):
        names = {value: name for name, value in VALUES.items()}
        encoded.append([names[round(float(x.mean()), 3)] for x in image])
        return image.mean(axis=(1, 2, 3))[:, None, None]

    def generate(model, params, batch, *, max_new_tokens, num_samples=1, eos_token, **kw):
        if len(prompts) == dies_at:
            raise KeyboardInterrupt
        assert "image" not in batch
        prompts.append([])
        tokens = np.zeros((len(batch["text"]), num_samples, max_new_tokens), np.int32)
        for i, sample in np.ndindex(tokens.shape[:2]):
            prompt = TOKENIZER.to_str(batch["text"][i][batch["mask_input"][i] == 1])
            prompts[-1].append(prompt)
            said = answer(prompt, round(float(batch["zimg"][i].mean()), 3), sample)
            ids = [*TOKENIZER.to_int(said), eos_token[0]][:max_new_tokens]
            tokens[i, sample, : len(ids)] = ids
        return tokens, np.where(tokens > 0, -0.5, 0).astype(np.float32)

    monkeypatch.setattr(decode, "generate", generate)
    monkeypatch.setattr(decode, "encode_images", encode_images)
    return prompts, encoded


def carried_on(prompt, pixel, sample=0):
    """Knows each answer, but says "no" once there is a "no" in the prompt, and to every plane."""
    last = prompt.strip().splitlines()[-1]
    if "no\n" in prompt or "plane" in last:
        return "no"
    return next(answer for about, answer in TRUTH.items() if about in last)


def make_evaluator(**kw):
    kw = dict(inputs=make_inputs(), turns=3, controls=(), **PP) | kw
    return dialogue.Evaluator(None, TOKENIZER, **kw)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").open()]


def test_histories_and_accuracy_by_turn(monkeypatch, tmp_path):
    _, encoded = answer_with(monkeypatch, carried_on)
    metrics = make_evaluator(outdir=tmp_path).run({})
    rows = rows_of(tmp_path)
    assert [r["turn"] for r in rows] == [1, 2, 3] * 3
    by_id = {}
    for r in rows:
        by_id.setdefault(r["dialogue_id"], []).append(r)
    assert sorted(by_id)[:2] == ["q0", "q3"] and len(by_id) == 3  # of c, q8 or q9 begins
    first, second, third = by_id["q0"]
    assert first["prompt"] == "answer en What modality, 0?\n"
    assert first["true_history_prompt"] == first["single_turn_prompt"] == first["prompt"]
    assert second["prompt"] == "answer en What modality, 0?\nCT\nanswer en What plane, 1?\n"
    assert second["predictions"] == ["no"] and not second["correct"]
    history = "answer en What modality, 0?\nCT\nanswer en What plane, 1?\n{}\n"
    assert third["prompt"] == history.format("no") + "answer en What organ, 2?\n"
    assert third["true_history_prompt"] == history.format("axial") + "answer en What organ, 2?\n"
    assert third["single_turn_prompt"] == "answer en What organ, 2?\n"
    said = [third[f"{who}predictions"] for who in ("", "true_history_", "single_turn_")]
    assert said == [["no"], ["liver"], ["liver"]]
    assert (third["correct"], third["true_history_correct"]) == (False, True)

    for who in ("model", *scoring.HISTORIES):
        key = "correct" if who == "model" else f"{who}_correct"
        for turn in (1, 2, 3):
            want = np.mean([r[key] for r in rows if r["turn"] == turn])
            assert metrics[f"{who}/turn/{turn}/acc"] == want
    assert metrics["n/turn/2"] == 3 and metrics["n"] == 9
    assert metrics == scoring.summarise(rows)  # as tools.report does it
    table = tables.format_table(metrics)
    assert "single turn" in table and "| turn 2 " in table
    # Three dialogues on two images, two at a time.
    assert encoded == [["a", "c"]]


def test_the_image_may_stand_amid_the_text(monkeypatch):
    """Behind BOS, of a prompt whose pp says so."""
    answer_with(monkeypatch, carried_on)
    answer, seen = decode.generate, []
    monkeypatch.setattr(
        decode, "generate", lambda m, p, batch, **kw: seen.append(batch["image_at"]) or answer(m, p, batch, **kw)
    )
    pp = PP["prompt_pp"].replace("outkey='text', mask_ar", "outkey='text', image_after='bos', mask_ar")
    inputs = [(batch | dict(image_at=np.ones(2, np.int32)), rows) for batch, rows in make_inputs()]
    make_evaluator(inputs=inputs, prompt_pp=pp).run({})
    assert len(seen) == 14 and all(x.tolist() == [1, 1] for x in seen)


def test_images_are_encoded_once(monkeypatch):
    _, encoded = answer_with(monkeypatch, carried_on)
    rows = [row(i, "abcd"[i % 4], "organ") for i in range(24)]
    make_evaluator(inputs=make_inputs(rows, 3), turns=2).run({})
    # Four images with three dialogues each, three at a time; the last batch is filled up.
    assert encoded == [["a", "b", "c"], ["d", "d", "d"]]


def test_what_is_asked_first_is_the_same_whatever_the_history(monkeypatch):
    prompts, _ = answer_with(monkeypatch, carried_on)
    make_evaluator().run({})
    # One pass at turn 1, three at each later one; two batches.
    assert len(prompts) == 2 * (1 + 3 + 3)


def test_prompts_are_those_of_training():
    question = dict(question="Which organ?", answer="left lung")
    train = get_preprocess_fn(
        common.train_pp(8, 31, "tiny")
        .partition("strfmt")[2]
        .join(["strfmt", ""])
        .replace("'image', ", "")
        .replace('"image", ', "")
    )(dict(question))
    trained = train["text"][train["text"] > 0]  # BOS, question, newline, answer, EOS
    history = get_preprocess_fn(PP["history_pp"])(dict(question))["text"]
    newline = TOKENIZER.to_int("\n")
    np.testing.assert_array_equal(history, [*trained[1:-1], *newline])
    prompt_pp = get_preprocess_fn(PP["prompt_pp"])
    single = prompt_pp(question | {"history": np.zeros(0, np.int32)})
    plain = TEXT_PP(dict(question))
    for key in ("text", "mask_ar", "mask_input"):
        np.testing.assert_array_equal(single[key][:32], plain[key])
    both = prompt_pp(question | {"history": history})
    on = both["mask_input"] > 0
    want = [TOKENIZER.bos_token, *history, *plain["text"][plain["mask_input"] > 0][1:]]
    np.testing.assert_array_equal(both["text"][on], want)
    assert not both["mask_ar"][on].any() and both["mask_ar"][~on].all()


def test_which_dialogues(monkeypatch, tmp_path):
    answer_with(monkeypatch, carried_on)

    def dialogues(name, **kw):
        make_evaluator(outdir=tmp_path / name, **kw).run({})
        rows = rows_of(tmp_path / name)
        return [[r["question_id"] for r in rows[i : i + 3]] for i in range(0, len(rows), 3)]

    usual = dialogues("a")
    assert usual[:2] == [["q0", "q1", "q2"], ["q3", "q4", "q5"]]
    assert usual[2] in (["q8", "q9", "q10"], ["q9", "q10", "q11"])
    # The same image has the same ones without the others, and in other batches.
    assert dialogues("b", inputs=make_inputs(ROWS[8:], 4)) == usual[2:]
    assert dialogues("c", inputs=make_inputs(batch_size=5)) == usual
    # They need not lie together: records of a data set are in no order.
    mixed = [ROWS[i] for i in np.random.default_rng(0).permutation(len(ROWS))]
    assert sorted(dialogues("d", inputs=make_inputs(mixed))) == sorted(usual)
    drawn = {dialogues(f"s{seed}", dialogue_seed=seed)[2][0] for seed in range(8)}
    assert drawn == {"q8", "q9"}


def test_killed_it_goes_on(monkeypatch, tmp_path):
    about = dict(fingerprint="f", section=dict(turns=3))
    answer_with(monkeypatch, carried_on)
    make_evaluator(outdir=tmp_path / "a", about=lambda params: about).run({})
    answer_with(monkeypatch, carried_on, dies_at=9)
    with pytest.raises(KeyboardInterrupt):
        make_evaluator(outdir=tmp_path / "b", about=lambda params: about).run({})
    prompts, _ = answer_with(monkeypatch, carried_on)
    make_evaluator(outdir=tmp_path / "b", about=lambda params: about).run({})
    assert len(prompts) == 7  # the second batch alone
    for name in (results.PREDICTIONS, results.METRICS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_first_sample_goes_on(monkeypatch, tmp_path):
    answer_with(monkeypatch, lambda prompt, pixel, sample: f"s{sample}")
    make_evaluator(outdir=tmp_path, pred_kw=dict(num_samples=2, temperature=1.0, max_new_tokens=8)).run({})
    second = rows_of(tmp_path)[1]
    assert second["predictions"] == ["s0", "s1"] == second["true_history_predictions"]
    assert "\ns0\n" in second["prompt"] and "s1" not in second["prompt"]


def test_a_prompt_that_is_cut_is_counted(monkeypatch, tmp_path):
    answer_with(monkeypatch, carried_on)
    short = common.dialogue_eval(CONFIG, "x", "test", text_len=30, max_new_tokens=8)["prompt_pp"]
    metrics = make_evaluator(outdir=tmp_path, prompt_pp=short).run({})
    cut = [r["tokens_cut"] for r in rows_of(tmp_path)]
    assert cut[0] == 0 and cut[2] > 0 and metrics["truncated"] == sum(c > 0 for c in cut)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(turns=1), "turns is 1; expected 2 or more"),
        (dict(controls=("blank_image",)), "controls has 'blank_image'"),
        (dict(turns=7), "no image of the split has 7 questions"),
        (dict(inputs=[]), "no image of the split has 3 questions"),
        (
            dict(
                inputs=[
                    (b, [{k: v for k, v in r.items() if k != "image_id"} for r in rows]) for b, rows in make_inputs()
                ]
            ),
            "'q0' has no 'image_id'",
        ),
    ],
)
def test_what_can_not_be(monkeypatch, kw, message):
    answer_with(monkeypatch, carried_on)
    with pytest.raises(ValueError, match=message):
        make_evaluator(**kw).run({})


def test_with_a_model_and_a_mesh(tmp_path):
    model = paligemma.Model(
        img=dict(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=(4, 4)),
        llm=dict(variant="gemma_mu", depth=1),
    )
    rng = np.random.default_rng(0)
    shapes = paligemma.abstract_params(model, image_size=8)
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)
    mesh = sharding.make_mesh()
    inputs = [(jax.device_put(b, sharding.batch_sharding(mesh)), r) for b, r in make_inputs(batch_size=8)]
    kw = dict(inputs=inputs, controls=(), pred_kw=dict(max_new_tokens=4))
    dialogue.Evaluator(model, "tiny", outdir=tmp_path / "a", turns=3, **PP, **kw).run(params)
    vqa.Evaluator(model, "tiny", outdir=tmp_path / "b", **kw).run(params)
    alone = {r["question_id"]: r for r in rows_of(tmp_path / "b")}
    differs = 0
    for r in rows_of(tmp_path / "a"):
        want = alone[r["question_id"]]
        assert r["single_turn_predictions"] == want["predictions"]
        assert r["single_turn_logprobs"] == pytest.approx(want["logprobs"], abs=1e-4)
        assert r["image_key"] == want["image_key"]
        differs += r["logprobs"] != pytest.approx(want["logprobs"], abs=1e-3)
    assert differs == 6  # all but the first turns
