"""OmniMedVQA in its released layout, with each oddity that the files have; all rows made up."""

import json
import zipfile

import pytest

from data_prep.builders import questioned
from data_prep.datasets.omnimedvqa import layout
from data_prep.files import DataError
from paligemma_med.evaluation import predictions, questions
from paligemma_med.metrics import scoring
from paligemma_med.pp import rows as row_keys
from tests.data_prep import made

FRACTIONS = dict(validate_fraction=0.2, test_fraction=0.3)


def row(number, image="a b & (c)/x0.png", answer="CT", options=("MRI", "CT", "PET", "X-ray"), **kw):
    found = dict(
        dataset="Made",
        question_id=f"Made_{number:04}",
        question_type="Modality Recognition",
        question=f"What is {number}?",
        gt_answer=answer,
        image_path=f"Images/{image}",
        modality_type="CT(Computed Tomography)",
    )
    return found | {k: o for k, o in zip(layout.OPTIONS, options)} | kw


class Release:
    def __init__(self, root):
        self.root, self.images = root, {}
        self.rows = [row(2 * i + k, f"a b & (c)/x{i}.png") for i in range(20) for k in range(2)]
        for i in range(20):
            self.images[f"a b & (c)/x{i}.png"] = made.image(i)

    def write(self, zipped=""):
        part = self.root / "QA_information" / "Open-access"
        made.write(part / "Made & (more).json", json.dumps(self.rows, indent=4))
        if zipped:
            with zipfile.ZipFile(self.root / zipped, "w") as z:
                for name, content in self.images.items():
                    z.writestr(f"{'OmniMedVQA/' if 'Omni' in zipped else ''}Images/{name}", content)
        else:
            for name, content in self.images.items():
                made.write(self.root / "Images" / name, content)
        return self.root

    def built(self, tmp_path, config="open_access", name="d", **options):
        report, splits = made.built("omnimedvqa", self.write(), tmp_path / name, config, **FRACTIONS, **options)
        return report, splits, {k: v for rows in splits.values() for k, v in rows.items()}

    def checked(self, tmp_path, **kw):
        store = layout.open_images(self.write())
        found = list(layout.read_part(self.root, "open_access", False, store))
        all_of_it = questioned.Questions(found, {"images": store}, lambda row, digest: "train")
        return made.checked(all_of_it, self.root, tmp_path / "work", **kw)


@pytest.fixture
def release(tmp_path):
    return Release(tmp_path / "raw")


def test_the_draw_depends_on_seed_and_content_alone():
    keys = [str(i).encode() for i in range(2000)]
    drawn = [questioned.drawn_split(k, 0.1, 0.2, 0) for k in keys]
    assert abs(drawn.count("test") - 400) < 80 and abs(drawn.count("validate") - 200) < 60
    assert drawn != [questioned.drawn_split(k, 0.1, 0.2, 1) for k in keys]
    assert {questioned.drawn_split(k, 0.0, 1.0, 0) for k in keys} == {"test"}


def flags(report):
    return {what: note["count"] for part in report["splits"].values() for what, note in part["flags"].items()}


def dropped(report):
    return {what: note["first"] for part in report["splits"].values() for what, note in part["dropped"].items()}


def test_records_and_splits(release, tmp_path):
    report, splits, rows = release.built(tmp_path)
    assert len(rows) == 40 and set(splits) == {"train", "validate", "test"}
    images = {s: {x["image_id"] for x in split.values()} for s, split in splits.items()}
    assert sum(map(len, images.values())) == 20  # both questions of an image in one split
    assert rows["Made_0002"] == dict(
        image=made.image(1),
        question_id="Made_0002",
        image_id="a b & (c)/x1.png",
        question="What is 2?",
        answer="CT",
        answer_type="CLOSED",
        content_type="Modality Recognition",
        modality="CT",
        dataset="Made",
        options_text="A: MRI B: CT C: PET D: X-ray",
        choice_a="MRI",
        choice_b="CT",
        choice_c="PET",
        choice_d="X-ray",
        answer_letter="B",
    )
    _, again, opened = release.built(tmp_path, "open_access_open")
    assert {s: set(x) for s, x in again.items()} == {s: set(x) for s, x in splits.items()}
    assert (
        opened["Made_0002"] | dict(answer="CT", answer_type="OPEN", choice_a="", options_text="") == opened["Made_0002"]
    )
    assert report["shared"]["image"]["train+test"]["count"] == 0


def test_a_copy_under_another_name_stays_with_its_image(release, tmp_path):
    for i in range(20):
        release.images[f"other/x{i}.jpeg"] = release.images[f"a b & (c)/x{i}.png"]
        release.rows.append(row(100 + i, f"other/x{i}.jpeg"))
    _, splits, _ = release.built(tmp_path)
    for split in splits.values():
        stems = {x["image_id"].rsplit("/", 1)[-1].split(".")[0] for x in split.values()}
        assert len(split) == 3 * len(stems)


def test_all_of_it_is_test_as_the_release_is_meant(release, tmp_path):
    options = dict(validate_fraction=0.0, test_fraction=1.0)
    _, splits = made.built("omnimedvqa", release.write(), tmp_path / "d", "open_access", **options)
    assert list(splits) == ["test"] and len(splits["test"]) == 40
    with pytest.raises(DataError, match="test_fraction 1.0; expected at least 0, and at most 1 together"):
        made.built("omnimedvqa", release.root, tmp_path / "e", "open_access", test_fraction=1.0)


@pytest.mark.parametrize(
    "change, letter, flag, reason",
    [
        (dict(answer="ct."), "B", "option found by its text without case and full stops", None),
        (dict(options=("No", "Yes.")) | dict(answer="No"), "A", None, None),
        (dict(options=("CT", "MRI", "MRI")), "A", "two wrong options alike", None),
        (dict(options=("CT", "MRI", "CT")), "", None, "two options are the answer"),
        (dict(answer="SPECT"), "", None, "no option is the answer"),
        (dict(options=("CT", "", "MRI")), "", None, "an empty option, or fewer than two"),
        (dict(answer=" "), "", None, "no option is the answer"),
        (dict(question=" "), "", None, "no question"),
    ],
)
def test_options(release, tmp_path, change, letter, flag, reason):
    release.rows[5] = row(5, "a b & (c)/x2.png", **change)
    report, rows = release.checked(tmp_path)
    assert dropped(report) == ({reason: ["Made_0005"]} if reason else {})
    assert flags(report) == ({flag: 1} if flag else {})
    if letter:
        found = rows["Made_0005"]
        assert found["answer_letter"] == letter and found[f"choice_{letter.lower()}"] == found["answer"]


@pytest.mark.parametrize(
    "written, wanted",
    [
        ("CT(Computed Tomography)", "CT"),
        ("MR (Mag-netic Resonance Imaging)", "MRI"),
        ("OCT (Optical Coherence Tomography", "OCT"),
        ("ultrasound", "Ultrasound"),
        ("X-Ray", "X-ray"),
        ("Microscopy Images", "Microscopy"),
        ("Fundus Photography", "Fundus photography"),
        ("Sonar", None),
    ],
)
def test_modalities_have_one_name(written, wanted):
    assert layout.modality_of(written) == (wanted or written, bool(wanted))


def test_odd_rows_are_told(release, tmp_path):
    release.rows[0]["modality"] = release.rows[0].pop("modality_type")
    release.rows[1]["modality_type"] = "Sonar"
    release.rows[3]["question_id"] = "Made_0002"
    release.images["a b & (c)/x0.png"] = made.image(0, "TIFF")
    report, _, rows = release.built(tmp_path)
    assert set(flags(report)) == {
        "the modality stands under the key modality",
        "modality 'Sonar' is in no table, kept",
        "question_id comes again, numbered",
    }
    assert rows["Made_0000"]["modality"] == "CT" and rows["Made_0001"]["modality"] == "Sonar"
    assert rows["Made_0002#2"]["question"] == "What is 3?"
    assert rows["Made_0000"]["image"][:4] == b"\x89PNG"  # by content: the name says PNG, the file is TIFF


def test_an_image_is_never_looked_up_by_its_last_name(release, tmp_path):
    release.images["elsewhere/x1.png"] = release.images.pop("a b & (c)/x1.png")
    with pytest.raises(DataError, match=r"1 of 20 images are missing, e.g. a b & \(c\)/x1.png"):
        release.checked(tmp_path)
    report, rows = release.checked(tmp_path, allow_missing=True)
    assert dropped(report) == {"image missing": ["Made_0002", "Made_0003"]} and len(rows) == 38


@pytest.mark.parametrize("zipped", ["Images.zip", "OmniMedVQA.zip"])
def test_images_may_stay_zipped(release, zipped):
    store = layout.open_images(release.write(zipped))
    row = next(layout.read_part(release.root, "open_access", False, store))
    assert store.read(row.image) == made.image(0) and row.features["image_id"] == "a b & (c)/x0.png"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_path="Images/../../x.png"), r"\(more\).json row 5: image_path: .*expected a relative path inside"),
        (dict(gt_answer=3), "row 5: gt_answer is 3; expected text"),
        (dict(option_B=None), "row 5: option_B is None; expected text"),
        ("text", "row 5: found 'text'; expected an object"),
    ],
)
def test_rows_refused(release, tmp_path, change, message):
    release.rows[5] = change if isinstance(change, str) else release.rows[5] | change
    with pytest.raises(DataError, match=message):
        release.checked(tmp_path)


def test_folders_and_files_refused(release, tmp_path):
    release.write()
    with pytest.raises(DataError, match=f"did you mean {release.root}"):
        layout.check_folder(tmp_path)
    with pytest.raises(DataError, match="no QA_information/Restricted-access"):
        made.built("omnimedvqa", release.root, tmp_path / "d", "restricted")
    del release.rows[5]["gt_answer"]
    with pytest.raises(DataError, match="row 5: key gt_answer missing; expected dataset, question_id"):
        release.built(tmp_path)


def test_evaluations_take_questions_of_two_to_four_options(tmp_path):
    """In a set's records the choices that a question lacks are empty texts; they are no choices."""
    keys, lines = row_keys.CHOICES, []
    for i, options in enumerate([("a", "b"), ("a", "b", "c", "d")]):
        source = dict(zip(keys, [*options, "", ""])) | {"answer_letter": "B", "question_id": str(i)}
        line = dict(question_id=str(i), question="q", answer="b", answer_type="CLOSED", predictions=["B"])
        line |= questions.choices_of(source, keys) | dict(option_logprobs=[-1.0 - j for j in range(len(options))])
        lines.append(line | dict(option_tokens=[1] * len(options)))
    assert [len(x["choices"]) for x in lines] == [2, 4]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    figures = scoring.summarise(predictions.read(path), "multiple_choice")
    assert figures["model/overall/acc_letter"] == 1 and figures["model/overall/acc_likelihood"] == 0
    path.write_text(path.read_text().replace("[-1.0, -2.0]", "[-1.0]", 1))
    with pytest.raises(ValueError, match="option_logprobs has 1 numbers; expected 2, one a choice"):
        predictions.read(path)
