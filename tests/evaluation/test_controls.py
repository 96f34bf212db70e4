"""Controls: majorities worked by hand and on SLAKE; images that are none."""

import json

import numpy as np

from paligemma_med import decode
from paligemma_med.evaluation import controls, questions
from paligemma_med.metrics import scoring


def train_row(question_id, question, answer, answer_type="OPEN"):
    return dict(question_id=question_id, question=question, answer=answer, answer_type=answer_type)


def test_majority_answer():
    rows = [
        train_row("q10", "Where?", "left"),
        train_row("q2", "Where?", "right"),
        train_row("q3", "Where? ", "top"),
        train_row("q4", "Where?", "top "),
        train_row("q10", "Tie?", "b", "CLOSED"),
        train_row("q9", "Tie?", "c", "CLOSED"),
        train_row("q11", "Other?", "b", "CLOSED"),
    ]
    majority = controls.majority_answers(rows)
    assert majority == controls.majority_answers(rows[::-1])

    def answer(question, answer_type="OPEN"):
        return controls.majority_answer(majority, train_row("", question, "", answer_type))

    assert answer(" Where?") == "top"
    assert answer("Tie?") == "c"  # q9 comes before q10
    assert answer("where?") == "top"  # not seen so written, but OPEN is
    assert answer("New?", "CLOSED") == "b"
    assert answer("New?", "NUMBER") == ""
    # Of a type: the questions' own majorities don't matter.
    row = train_row("", "Tie?", "", "OPEN")
    assert controls.majority_of_type(majority, row) == "top"
    assert controls.majority_of_type(majority, {**row, "answer_type": "NUMBER"}) == ""


def test_majority_of_slake(real_data):
    """The question-only control of SLAKE-en that issue 2 states: 66.1, 45.6 and 53.6 %."""
    train, test = (
        [
            {**row, "question_id": row["qid"]}
            for row in json.loads((real_data / "slake" / f"{split}.json").read_text())
            if row["q_lang"] == "en" and row["answer"].strip()
        ]
        for split in ("train", "test")
    )
    majority = controls.majority_answers(train[::-1])
    for row in test:
        row["majority_prediction"] = controls.majority_answer(majority, row)
        row["predictions"] = [""]
        row |= scoring.correct(row["majority_prediction"], row["answer"], "majority_")
    metrics = scoring.summarise(test, controls=["majority"])
    assert metrics["n"] == 1061
    for figure, closed, opened, overall in (
        ("acc_strict", 66.11, 45.58, 53.63),
        # 4 more, as "Transverse  Plane" in test has a blank too many.
        ("acc", 66.11, 46.20, 54.01),
    ):
        assert [
            round(100 * metrics[f"majority/{group}/{figure}"], 2)
            for group in ("answer_type/CLOSED", "answer_type/OPEN", "overall")
        ] == [closed, opened, overall]


def test_images_that_are_none():
    image = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    key = questions.image_key(image)
    assert key == questions.image_key(np.asfortranarray(image)) != questions.image_key(image[::-1])
    assert len(key) == 16
    blank = decode.blank_image((2, 2, 3))
    assert blank.dtype == np.float32 and not blank.any()
    big = (64, 64, 3)
    noise = controls.noise_image(big, key)
    np.testing.assert_array_equal(noise, controls.noise_image(big, key))
    assert noise.dtype == np.float32 and -1 <= noise.min() < -0.99 < 0.99 < noise.max() < 1
    assert abs(noise.mean()) < 0.02
    for other in (controls.noise_image(big, key, seed=1), controls.noise_image(big, "0" * 16)):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.05
