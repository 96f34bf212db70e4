"""tools.report: predictions that hold their own answers."""

import openpyxl
import pytest

from tests.tools.report.reports import table, warnings
from tools.report import contamination, foreign
from tools.report.__main__ import make

# --- Contamination ---

# The layout of the authors' sheet: a Python object's address for the image, the prompt in front.
IMAGE = "<PIL.PngImagePlugin.PngImageFile image mode=RGB size=512x327 at 0x74C258F0{:04X}>"


def write_sheet(path, lines):
    book = openpyxl.Workbook()
    for line in [("Image ID", "Question", "Generated Answer", "Label"), *lines]:
        book.active.append(line)
    book.save(path)


def contaminated():
    """Six questions asked of four images each, answered without looking, prompt and all."""
    lines = []
    for q in range(6):
        question = f"What does the finding number {q} suggest?"
        for i in range(4):
            said = f"answer {question}\nThe finding suggests that thing."
            truth = f"The finding suggests tumour {i} in organ {q}."
            lines.append((IMAGE.format(10 * q + i), question, said, truth))
    return lines


def test_the_authors_layout_shows_their_contamination(tmp_path):
    write_sheet(tmp_path / "inference_results.xlsx", contaminated())
    (e,) = [foreign.load(tmp_path / "inference_results.xlsx", []).evaluation]
    read = contamination.ours(e)
    assert len(read) == 24 and read[0]["image"] is None
    found = contamination.examine(read)
    assert found["with_prompt"] == found["starts_with_prompt"] == 24
    assert (found["repeated"], found["always_same"], found["truth_same"]) == (6, 6, 0)
    assert found["constant_right"] == 6 and found["right"] == 0
    made = make([], foreign=[tmp_path / "inference_results.xlsx"])
    said = " ".join(warnings(made))
    assert "24 of 24 (100.0 %) of the predictions begin with the prompt" in said
    assert "the truth differs in 6 of them: the answers do not depend on the image" in said
    signs = table(made, "Signs of contamination")
    assert signs["· always answered the same"]["found"] == "6 of 6 (100.0 %)"
    assert signs["· by a majority answer, which sees no image"]["found"] == "6 of 6 (100.0 %)"
    scored = table(made, "What an answer without the image would score")
    assert set(scored) == {"predictions as given", "without the prompt", "the prompt alone", "the question alone"}


def test_sound_predictions_raise_no_alarm():
    clean = [
        dict(question="What does it show?", prediction=f"tumour {i}", answer=f"tumour {i}", image=str(i))
        for i in range(8)
    ]
    section = contamination.section("t", clean)
    assert not [b for b in section.blocks if b.kind == "warning"]
    found = contamination.examine(clean)
    assert found["always_same"] == 0 and found["right"] == 8 and found["constant_right"] == 1


def test_one_image_asked_twice_is_no_repeated_question():
    two = [dict(question="Same?", prediction="a", answer="b", image="1")] * 2
    assert contamination.examine(two)["repeated"] == 0
    assert contamination.examine([r | {"image": None} for r in two])["repeated"] == 1


def test_an_echo_that_scores_as_well_is_said():
    echo = [
        dict(
            question=f"Is there a large mass in lobe {i}?",
            image=str(i),
            answer=f"large mass {i}",
            prediction=f"answer en Is there a large mass in lobe {i}?\nno",
        )
        for i in range(6)
    ]
    said = [b.text for b in contamination.section("t", echo).blocks if b.kind == "warning"]
    assert any("Repeating the prompt, without image or model, scores" in text for text in said)


@pytest.mark.parametrize(
    "prediction, prompt",
    [
        ("answer en Is it there?\nyes", "answer en Is it there?"),
        ("Is it there?", "Is it there?"),
        ("yes", ""),
        ("The question Is it there? is hard", "The question Is it there?"),
        ("One could well ask Is it there?", ""),
    ],
)
def test_prompt_of(prediction, prompt):
    row = dict(question=" Is it there?", prediction=prediction)
    assert contamination.prompt_of(row) == prompt
