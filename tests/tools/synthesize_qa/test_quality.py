"""Scores by hand, tags of all rules, and the authors' released questions by both measures."""

import pytest

from data_prep.curate.words import as_words
from tools.synthesize_qa import leaks, quality
from tools.synthesize_qa.configs import default


def tags(question, answer, caption="A mass in the liver. CT with contrast.", **kw):
    row = dict(question=question, answer=answer, caption=caption, image_id="i", source_text=caption)
    verdict = quality.Quality(default.get_config().to_dict()).judge({**row, **kw}, "n")
    assert [x for x in verdict.failed if x in verdict.reasons] == verdict.reasons
    return verdict.quality["tags"]


@pytest.mark.parametrize(
    "question, answer, expected",
    [
        ("Which organ is abnormal?", "The liver", []),
        ("Is there a mass?", "Yes", []),
        ("What is shown?", "N/A", ["empty"]),
        ("Which organ is it?", "I'm sorry, I can't see images.", ["refusal", "not_in_source"]),
        ("What does the caption say?", "A mass", ["meta_talk"]),
        ("Which organ is described in the report?", "The liver", ["meta_talk"]),
        ("Which organ is abnormal?", "Sure! The liver", ["chatter"]),
        ("The organ that is abnormal", "The liver", ["form"]),
        ("Why?", "A mass", ["length"]),
        ("Où est la lésion?", "Dans le lobe droit du foie", ["language", "not_in_source"]),
        ("What is the patient's medical history?", "A mass", ["history"]),
        ("What is the size of the mass?", "3 cm", ["measurement", "numbers"]),
        ("Is there a mass in the liver on CT?", "A mass in the liver on CT", ["leak"]),
        ("Which organ is abnormal?", "Splenic artery aneurysm", ["not_in_source"]),
    ],
)
def test_tags(question, answer, expected):
    assert tags(question, answer) == expected


def test_options_are_looked_at_too():
    options = dict(zip("abcd", ["The liver", "The lung", "Spleen", "Heart"], strict=True))
    options = {f"choice_{k}": v for k, v in options.items()}
    question, answer = "Which organ is abnormal?", "The liver"
    assert tags(question, answer, **options) == []
    assert tags(question, answer, **options | {"choice_c": "2 cm"}) == ["measurement", "numbers"]
    assert tags(question, answer, **options | {"choice_d": "I can't see it"}) == ["refusal"]


def test_an_example_that_is_copied():
    shown = {as_words("Which organ is abnormal?", "The liver.")}
    shown |= {as_words("Is there a fracture?", "No")}
    assert tags("Which organ is abnormal?", "the liver", example_pairs=shown) == []
    elsewhere = dict(caption="The spleen is large", example_pairs=shown)
    assert tags("Which organ is  abnormal", "The LIVER", **elsewhere) == ["form", "copied_example"]
    assert tags("Which organ is abnormal?", "The spleen", **elsewhere) == []
    assert "copied_example" in tags("Which organ is abnormal?", "The left kidney", **elsewhere)
    assert tags("Is there a fracture?", "No", **elsewhere) == ["copied_example"]
    assert tags("Is there a fracture?", "Yes", **elsewhere) == []


def test_leak_measures():
    assert quality.leak("Is the LEFT lung white?", "Left lung, MRI") == 2 / 3
    assert quality.leak("Is it?", "No") == 0 == quality.leak("", "")
    # The caption's: mass, left, lung (an, the and in are too short), each once.
    assert quality.caption_leak("Is the left lung white?", "Mass in the left lung. Lung!") == 2 / 3
    assert quality.caption_leak("Is it?", "A T2 CT") == 0


def test_leaks_of_a_file(tmp_path, capsys):
    path = tmp_path / "qa.jsonl"
    path.write_text(
        '{"image_id": "a", "question": "Is the left lung white?", "answer": "Mass in left lung"}\n'
        '{"image_id": "b", "question": "Is it?", "answer": "The liver", "caption": "Is it so?"}\n'
    )
    found = leaks.measure(path)
    assert found["pairs"] == 2 and found["with_caption"] == 1
    assert found["leak"] == {"mean": pytest.approx(1 / 3), "at_least_half": 0.5}
    assert found["caption_leak"] == {"mean": 0, "at_least_half": 0}
    found = leaks.measure(path, {"a": "left", "b": "white"})
    assert found["with_caption"] == 2 and found["caption_leak"]["mean"] == 0.5
    found = leaks.measure(path, answer_is_caption=True)
    assert found["caption_leak"]["mean"] == pytest.approx(1 / 3)


@pytest.mark.real_data
def test_the_authors_questions_by_their_measure(real_data):
    """All of theirs: 35 % on average, half or more in 27 %; these are the first 400 of each."""
    folder = real_data / "medm"
    for split, mean, half in (("test", 0.364, 0.295), ("valid", 0.359, 0.2725)):
        path = folder / f"roco_{split}_qa.first400.json"
        found = leaks.measure(path, answer_is_caption=True)
        assert found["pairs"] == 400
        assert found["caption_leak"]["mean"] == pytest.approx(mean, abs=0.001)
        assert found["caption_leak"]["at_least_half"] == pytest.approx(half, abs=0.001)
