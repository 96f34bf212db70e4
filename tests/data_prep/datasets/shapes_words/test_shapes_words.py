"""The third lesson: words of everyday and of radiology are said, and never about a picture."""

import json
from collections import Counter

from configs import tiny_base
from data_prep.build import build
from data_prep.datasets.phantom import questions as phantom_questions
from data_prep.datasets.phantom.draw import FINDINGS, MODALITIES, Finding
from data_prep.datasets.shapes_words import words
from paligemma_med.pp.tokenizer import get_tokenizer


def test_questions_about_shapes_and_words_to_say(tmp_path):
    build("shapes_words", data_dir=tmp_path, num_images=(20, 2, 2), seed=3)
    rows = json.loads((tmp_path / "downloads" / "shapes_words" / "train.json").read_text())
    by_type = Counter(r["content_type"] for r in rows)
    assert by_type["Words"] == 20 * words.WORDS_ASKED and by_type["Description"] > 20 and by_type["Presence"] > 5
    said = [r for r in rows if r["content_type"] == "Words"]
    assert len({r["question"] for r in said}) > 60
    for r in said:
        assert r["question"].startswith("Say ") and r["answer"][0].isupper()
        assert r["answer"].lower() == r["question"][4:].lower()
    others = " ".join(f"{r['question']} {r['answer']}".lower() for r in rows if r["content_type"] != "Words")
    assert not any(w in others for w in ("chest", "infarct", "effusion", "nodule", "abnormal"))


def test_the_phantoms_words_are_among_them():
    states = [
        (r, m, f)
        for r in FINDINGS
        for m in MODALITIES[r]
        for f in (None, *(Finding(k, "Left", "Upper") for k in FINDINGS[r]))
    ]
    answers = {q.answer for s in states for group in phantom_questions.candidates(*s) for q in group}
    of_shapes = {"yes", "no", "left", "right", "upper", "lower"}
    assert {w.lower() for a in answers for w in a.split()} <= {w.lower() for w in words.WORDS} | of_shapes
    assert len(set(words.WORDS)) == len(words.WORDS) > 200


def test_a_word_fits_the_bases_text():
    tokenizer, config = get_tokenizer(tiny_base.TOKENIZER), tiny_base.get_config("lesson=3")
    for word in words.WORDS:
        prompt, answer = (tokenizer.to_int(x) for x in (f"answer en Say {word}\n", word[0].upper() + word[1:]))
        assert 1 + len(prompt) + len(answer) + 1 <= config.text_len + 1
        assert len(answer) + 1 <= config.supervised_len
