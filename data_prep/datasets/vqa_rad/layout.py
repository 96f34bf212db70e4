"""Reads VQA-RAD's question files into checked rows: the public JSON, or trainset and testset.

Both come from a manually filled spreadsheet, and it shows: numbers among the texts, tabs instead of
commas, "NULL" for nothing, misspelt types. Each repair is small, the same in both layouts, and counted
in the build report.
"""

import dataclasses
import difflib
import hashlib
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tqdm

from data_prep import files
from data_prep.files import DataError
from data_prep.images import store as image_store
from data_prep.images.store import Store
from data_prep.ledger import Ledger

SPLITS = ("train", "validate", "test")
PUBLIC = "VQA_RAD Dataset Public.json"
SETS = {"train": "trainset.json", "test": "testset.json"}
IMAGES = ("VQA_RAD Image Folder", "VQA_RAD_Image_Folder", "images", "imgs")
EXPECTED = f"{PUBLIC!r} (or trainset.json and testset.json) and {IMAGES[0]!r} (or images/, or a zip"
EXPECTED += " file of that name)"
TYPES = "ABN ATTRIB COLOR COUNT MODALITY ORGAN OTHER PLANE POS PRES SIZE".split()
KEYS = "qid image_name question answer answer_type question_type phrase_type image_organ".split()
# Only the public file has these; "" otherwise.
PUBLIC_KEYS = {
    "linked_id": "qid_linked_id",
    "question_rephrase": "question_rephrase",
    "question_relation": "question_relation",
    "question_frame": "question_frame",
    "evaluation": "evaluation",
}


# The config of trainset.json and testset.json that leaves out what words a test question anew.
NO_TEST_FRAMES = "trainset_no_test_frames"


@dataclasses.dataclass(frozen=True)
class Row:
    """One kept question: the image's name in the store, and all text features by name."""

    image: str
    features: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Folder:
    """What `read_folder` found: rows by split, the images, and the report."""

    rows: dict[str, list[Row]]
    store: Store
    report: dict[str, Any]


def question_file(folder: pathlib.Path, layout: str) -> list[pathlib.Path]:
    """The question files of a layout (a config's name) in `folder`; empty if not all there."""
    if layout == "public":
        named = [p for p in folder.glob("*.json") if re.search("vqa.?rad.*public", p.name, re.I)]
        return sorted(named, key=lambda p: (p.name != PUBLIC, p.name))[:1]
    paths = [folder / name for name in SETS.values()]
    return paths if all(p.is_file() for p in paths) else []


def image_path(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder or zip file of images in `folder`, whatever the case of its letters."""
    there = {p.name.lower(): p for p in sorted(folder.iterdir(), reverse=True)}
    names = [n.lower() for n in IMAGES]
    return next((there[n] for n in [*names, *(f"{n}.zip" for n in names)] if n in there), None)


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it holds VQA-RAD.

    Raises:
      DataError: it doesn't; says what is missing and names a folder in it that looks right, if any.
    """
    folder = files.given_folder(folder, EXPECTED)
    missing = []
    if not any(question_file(folder, layout) for layout in ("public", "trainset")):
        missing.append("the question files")
    if image_path(folder) is None:
        missing.append("the images")
    if not missing:
        return folder
    hint = files.did_you_mean(folder, lambda p: question_file(p, "public") or question_file(p, "trainset"), above=False)
    raise DataError(f"{folder}: {' and '.join(missing)} not found; expected {EXPECTED}{hint}")


def _text(value: Any, where: str, key: str) -> tuple[str, list[str]]:
    """The repaired text, and what was repaired."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: {key} is {value!r:.80}; expected text")
    notes = [] if isinstance(value, str) else [f"a number as the {key}"]
    text = str(value).strip()
    if "\t" in text:
        notes.append(f"tab in the {key} read as a comma")
        text = re.sub(r"[ \t]*\t[ \t]*", ", ", text)
    if "\ufffd" in text:
        text, n = re.subn(r"(?<=\w)\ufffd(?=\w)", "'", text)
        notes.append(f"U+FFFD in the {key}" + (" read as an apostrophe" if n else ""))
    return text, notes


def _question_type(text: str) -> tuple[str, list[str]]:
    """ "PRSE, pos" -> "PRES, POS" and notes; a type that resembles no known one is kept."""
    types, notes = [], []
    for name in filter(None, re.split(r"[,;/\s]+", text.upper())):
        close = difflib.get_close_matches(name, TYPES, n=1, cutoff=0.7)
        if name not in TYPES:
            notes.append(f"question_type {name} {f'read as {close[0]}' if close else 'is unknown'}")
        types.append(close[0] if close else name)
    return ", ".join(dict.fromkeys(types)), notes


def _case_id(url: str) -> str:
    """The id in `https://medpix.nlm.nih.gov/case?id=48e1dd0e-…`; "" if there's none."""
    found = re.search(r"[?&]id=([\w-]+)", url)
    return found[1] if found else ""


def _read_row(row: Any, where: str, layout: str) -> tuple[str, dict[str, str], list[str]]:
    """(image name, features, notes) of one row; `where` is its file and place, for errors."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {row!r:.80}; expected an object with {', '.join(KEYS)}")
    if missing := [k for k in KEYS if k not in row]:
        raise DataError(
            f"{where}: key {', '.join(missing)} missing; expected the keys {', '.join(KEYS)}; found {', '.join(row)}"
        )
    texts, notes = {}, []
    for key in KEYS[1:]:
        texts[key], found = _text(row[key], where, key)
        notes += found
    try:
        qid = int(str(row["qid"]).strip()) if not isinstance(row["qid"], bool) else None
    except ValueError:
        qid = None
    if qid is None:
        raise DataError(f"{where}: qid is {row['qid']!r:.80}; expected a whole number")
    if (kind := texts["answer_type"].upper()) not in ("OPEN", "CLOSED"):
        raise DataError(f"{where}: answer_type is {row['answer_type']!r}; expected 'OPEN' or 'CLOSED'")
    content_type, found = _question_type(texts["question_type"])
    notes += found
    phrase = texts["phrase_type"].lower()
    features = {
        # trainset and testset number their own 3,515 rows; nearly none has the public file's qid.
        "question_id": str(qid) if layout == "public" else own_id(qid),
        "image_id": pathlib.PurePosixPath(texts["image_name"].replace("\\", "/")).stem,
        "question": texts["question"],
        "answer": texts["answer"],
        "answer_type": kind,
        "content_type": content_type,
        "phrase_type": phrase.removeprefix("test_"),
        "location": texts["image_organ"],
        "case_id": _case_id(str(row.get("image_case_url", ""))),
    }
    features |= {"public_id": features["question_id"] if layout == "public" else "", "made_from": ""}
    for name, key in PUBLIC_KEYS.items():
        if layout == "public" and key not in row:
            notes.append(f"key {key} missing")
        value, found = _text(row.get(key, ""), where, key)
        features[name] = "" if value.upper() == "NULL" else value
        notes += found if features[name] else []
    features["question_relation"] = features["question_relation"].lower()
    return texts["image_name"], features, notes


def own_id(qid: int | str) -> str:
    """The question_id of a row of trainset.json or testset.json, which no one takes for the public file's qid."""
    return f"trainset_{qid}"


def _raw_rows(folder: pathlib.Path, layout: str) -> Iterable[tuple[str, str, Any]]:
    """Yields (split, place, row) of all question files, before validate is separated."""
    paths = question_file(folder, layout)
    if not paths:
        need = PUBLIC if layout == "public" else " and ".join(SETS.values())
        raise DataError(f"{folder}: no {need} there; expected it for config {layout!r}")
    for path in paths:
        content = files.read_json(path, "a list of question rows")
        if not isinstance(content, list):
            raise DataError(f"{path}: found {content!r:.60}; expected a list of question rows")
        for i, row in enumerate(content):
            split = "test" if path.name == SETS["test"] else "train"
            if layout == "public" and isinstance(row, dict):
                is_test = str(row.get("phrase_type", "")).strip().lower().startswith("test")
                split = "test" if is_test else "train"
            yield split, f"{path} row {i}", row


def validation_images(images: Iterable[str], fraction: float, seed: int) -> set[str]:
    """A seeded share of images (image ids, in any order), at least one if `fraction` is above 0.

    Each image is ranked by a hash of seed and id, so that more images don't reshuffle the existing ones.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"validate_fraction is {fraction}; expected 0 up to, not including, 1")
    names = set(images)
    n = min(len(names) - 1, max(1, round(fraction * len(names)))) if fraction else 0
    return set(sorted(names, key=lambda x: hashlib.sha256(f"{seed} {x}".encode()).digest())[:n])


def read_folder(
    folder: pathlib.Path | str,
    layout: str,
    *,
    validate_fraction: float = 0.1,
    seed: int = 0,
    allow_missing_images: bool = False,
) -> Folder:
    """Reads and checks a whole folder.

    Args:
      folder: see `check_folder`.
      layout: "public", "trainset" or NO_TEST_FRAMES.
      validate_fraction: share of train's images whose questions become `validate`; 0: none.
      seed: of that choice.
      allow_missing_images: drop and count questions whose image is missing or broken instead of stopping.

    Raises:
      DataError: a malformed file, row or image; a duplicate question id.
    """
    folder = check_folder(folder)
    where = image_path(folder)
    if where is None:
        raise DataError(f"{folder}: the images not found; expected {EXPECTED}")
    store = image_store.open_store(where, by_name=True)
    read = [(split, *_read_row(row, place, layout)) for split, place, row in _raw_rows(folder, layout)]
    if layout != "public":
        _find_origins([(split, features) for split, _, features, _ in read])
        _join_public(folder, [features for _, _, features, _ in read])
    of_test = {features["question_id"] for split, _, features, _ in read if split == "test"}
    train_images = {features["image_id"] for split, _, features, _ in read if split == "train"}
    validate = validation_images(train_images, validate_fraction, seed)
    ledger = Ledger(SPLITS, ("content_type", "phrase_type", "location"))
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    ids: dict[str, str] = {}
    asked: set[tuple[str, str, str]] = set()
    checked: dict[str, files.Checked | None] = {}  # None: broken
    for split, image, features, notes in tqdm.tqdm(
        read, desc="checking rows and images", unit="", leave=False, disable=None
    ):
        if split == "train" and features["image_id"] in validate:
            split = "validate"
        qid = features["question_id"]
        ledger.read(split)
        if qid in ids:
            raise DataError(
                f"{folder}: question id {qid} in {ids[qid]} and in {split}; expected each once (ids are the files' qid)"
            )
        ids[qid] = split
        if empty := [k for k in ("question", "answer") if not features[k]]:
            ledger.drop(split, f"no {' and no '.join(empty)}", qid)
            continue
        if layout == NO_TEST_FRAMES and split != "test" and features["made_from"] in of_test:
            ledger.drop(split, "frame of a test question", qid)
            continue
        if image not in checked:
            if allow_missing_images and not store.has(image):
                ledger.drop(split, "image missing", qid)
                continue
            try:
                checked[image] = store.check(image)
            except DataError as e:
                if not allow_missing_images:
                    raise DataError(f"{e} (--allow_missing_images leaves such rows out)") from None
                checked[image] = None
        if (found := checked[image]) is None:
            ledger.drop(split, "image broken", qid)
            continue
        for note in (*notes, *(f"image: {note}" for note in found.notes)):
            ledger.flag(split, note, qid)
        key = (split, features["image_id"], features["question"].lower())
        if key in asked:
            ledger.flag(split, "asked twice about the same image", qid)
        asked.add(key)
        ledger.keep(split, features)
        _note_members(ledger, split, features, found.digest)
        rows[split].append(Row(image, features))
    used = {features["image_id"] for _, _, features, _ in read}
    stems = {pathlib.PurePosixPath(n).stem for n in store.names() if n.lower().endswith(".jpg")}
    frames = [features for _, _, features, _ in read if features["phrase_type"] == "frame"]
    report = {
        "folder": str(folder.resolve()),
        "layout": layout,
        **ledger.to_report(),
        "rows_with_public_id": sum(bool(features["public_id"]) for _, _, features, _ in read),
        "frames_of_unknown_origin": [f["question_id"] for f in frames if not f["made_from"]],
        "images_not_used": sorted(stems - used)[:100],
    }
    return Folder({s: r for s, r in rows.items() if r}, store, report)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _find_origins(rows: Sequence[tuple[str, dict[str, str]]]) -> None:
    """Sets `made_from` of each frame: the question_id of the row it words anew, of train or test.

    A frame stands one behind its question in the files' common count, with the same image and answer; where
    that row isn't such a one, "" stays.
    """
    by_id = {features["question_id"]: features for _, features in rows}
    for _, frame in rows:
        if frame["phrase_type"] != "frame":
            continue
        number = int(frame["question_id"].removeprefix(own_id("")))
        before = by_id.get(own_id(number - 1))
        if before and all(_plain(before[k]) == _plain(frame[k]) for k in ("image_id", "answer")):
            frame["made_from"] = before["made_from"] or before["question_id"]


def _join_public(folder: pathlib.Path, rows: Sequence[dict[str, str]]) -> None:
    """Sets `public_id` of each row of trainset.json and testset.json that the public file has, if that lies in
    `folder` too: found by image and question, of several equal ones in their order."""
    if not question_file(folder, "public"):
        return
    places: dict[tuple[str, str], list[str]] = {}
    for _, where, row in _raw_rows(folder, "public"):
        _, features, _ = _read_row(row, where, "public")
        places.setdefault((features["image_id"], _plain(features["question"])), []).append(features["question_id"])
    for features in rows:
        found = places.get((features["image_id"], _plain(features["question"])))
        if found and features["phrase_type"] != "frame":
            features["public_id"] = found.pop(0)


def _note_members(ledger: Ledger, split: str, features: dict[str, str], digest: str) -> None:
    """Records images and cases in the ledger, which reports what splits share (here by design)."""
    question = f"{digest} {_plain(features['question'])}"
    ledger.member(split, "image", digest, features["image_id"])
    ledger.member(split, "question about the same image", question, features["question_id"])
    # A frame stands with the question it was made of: the same image and answer in other words.
    if features["public_id"] != features["question_id"]:
        origin = features["made_from"] or features["question_id"]
        ledger.member(split, "question and its frame", origin, features["question_id"])
    if (answer := _plain(features["answer"])) not in ("yes", "no"):
        ledger.member(split, "answer about the same image", f"{digest} {answer}", features["question_id"])
    if features["case_id"]:
        ledger.member(split, "case", features["case_id"], features["case_id"])
    if features["linked_id"]:
        ledger.member(split, "question and its paraphrase", features["linked_id"], features["question_id"])


def describe(report: dict[str, Any]) -> Sequence[str]:
    """What the report says in addition to the ledger's lines."""
    lines = []
    if n := report["shared"].get("image", {}).get("train+test", {}).get("count"):
        total = report["splits"]["test"]["images"]
        lines.append(
            f"{n} of {total} test images are in train: VQA-RAD splits questions, not images, so "
            "its test scores don't show how a model does on new images"
        )
    if report["layout"] != "public":
        pairs = report["shared"].get("question and its frame", {})
        n = sum(pairs[p]["count"] for p in pairs if p.endswith("+test"))
        if n:
            lines.append(
                f"{n} test questions stand in train or validate in other words, as a frame with the same image and "
                f"answer: a test score here is partly recall; config {NO_TEST_FRAMES} leaves these frames out"
            )
        if joined := report["rows_with_public_id"]:
            lines.append(f"{joined:,} rows have a public_id, the public file's qid, found by image and question")
        else:
            lines.append(f"no row has a public_id: {PUBLIC!r} isn't in the folder")
    if origins := report["frames_of_unknown_origin"]:
        lines.append(f"frames whose question wasn't found: {len(origins)} ({', '.join(origins[:10])})")
    if unused := report["images_not_used"]:
        lines.append(f"images that no question uses: {len(unused)} ({', '.join(unused[:10])})")
    return lines
