"""What tests of evaluators share: five questions on three images, and a function that answers in the
model's place."""

import numpy as np

from paligemma_med import decode
from paligemma_med.evaluators import vqa
from paligemma_med.pp.tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("tiny")


def train_row(question_id, question, answer, answer_type="OPEN"):
    return dict(question_id=question_id, question=question, answer=answer, answer_type=answer_type)


IMAGES = {"ct": 0.1, "mr": 0.2, "xr": 0.3}  # image_id → value of its pixels


def question(i, image_id, text, answer, answer_type, content_type="Organ", **more):
    return dict(
        question_id=f"q{i}",
        image_id=image_id,
        question=text,
        answer=answer,
        answer_type=answer_type,
        content_type=content_type,
        **more,
    )


QUESTIONS = [
    question(0, "ct", "Which modality?", "CT", "OPEN", "Modality"),
    question(1, "mr", "Which modality?", "MR", "OPEN", "Modality"),
    question(2, "mr", "Is it normal?", "Yes", "CLOSED"),
    question(3, "xr", "Which modality?", "X-Ray", "OPEN", "Modality"),
    question(4, "xr", "Is it normal?", "Yes", "CLOSED"),
]

TRAIN = [
    train_row("0", "Which modality?", "MR"),
    train_row("1", "Is it normal?", "No", "CLOSED"),
]


def make_inputs(rows=QUESTIONS, batch_size=2, size=2, text_len=48):
    """Like input_pipeline.evaluation's: the last batch filled up with copies of its first row."""
    for start in range(0, len(rows), batch_size):
        valid = rows[start : start + batch_size]
        filled = valid + valid[:1] * (batch_size - len(valid))
        tokens = [[TOKENIZER.bos_token, *TOKENIZER.to_int(f"answer en {r['question']}\n")] for r in filled]
        on = np.arange(text_len) < np.array([len(t) for t in tokens])[:, None]
        yield (
            dict(
                image=np.stack([np.full((size, size, 3), IMAGES[r["image_id"]], np.float32) for r in filled]),
                text=np.stack([np.pad(t, (0, text_len - len(t))) for t in tokens]),
                mask_ar=1 - on.astype(np.int32),
                mask_input=on.astype(np.int32),
                _mask=np.arange(batch_size) < len(valid),
            ),
            valid,
        )


def answer_with(monkeypatch, answer, samples=1):
    """Puts `answer(prompt, image value, sample) -> str` in the place of decode.generate."""
    calls = []

    def generate(model, params, batch, *, max_new_tokens, num_samples=1, eos_token, **kw):
        calls.append({k: np.array(v) for k, v in batch.items()} | {"kw": kw})
        tokens = np.zeros((len(batch["text"]), num_samples, max_new_tokens), np.int32)
        for row, sample in np.ndindex(tokens.shape[:2]):
            prompt = TOKENIZER.to_str(batch["text"][row][batch["mask_input"][row] == 1])
            said = answer(prompt, round(float(batch["image"][row].mean()), 3), sample)
            ids = [*TOKENIZER.to_int(said), eos_token[0]][:max_new_tokens]
            tokens[row, sample, : len(ids)] = ids
        return tokens, np.where(tokens > 0, -0.5, 0).astype(np.float32)

    monkeypatch.setattr(decode, "generate", generate)
    return calls


def look(prompt, pixel, sample=0):
    """A good model: looks at the image for the modality, says yes otherwise."""
    names = {0.1: "ct", 0.2: "MR.", 0.3: "x-ray"}
    return names.get(pixel, "film") if "modality" in prompt else "yes"


def make_evaluator(**kw):
    kw = dict(inputs=list(make_inputs()), train_data=TRAIN) | kw
    return vqa.Evaluator(None, TOKENIZER, **kw)
