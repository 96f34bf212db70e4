"""Reads ROCOv2 and ROCO v1, the same kind of data in two layouts, into `captioned.Figure`s.

ROCOv2 (images `ROCOv2_2023_test_000001`): `{train,valid,test}_captions.csv`, optional files of UMLS
concepts, and per split a folder or zip file of JPEGs.
ROCO v1 (`ROCO_00001`; the version behind the paper's results, by the ids in the authors' files):
tab-separated captions without a header, in the layout of the data set's repository or of MedM.
"""

import io
import pathlib
import re
from collections.abc import Iterator

from data_prep import files
from data_prep.builders.figures import (
    CAPTION_AGAIN,
    Figure,
    Release,
    add_figure,
    check_disjoint,
    first_there,
    has_text,
)
from data_prep.files import DataError
from paligemma_med.pp import tables

# Split -> its name in the release's files and folders.
SPLITS = {"train": ("train",), "validate": ("valid", "validation", "val"), "test": ("test",)}
EXPECTED_V2 = "train_captions.csv, valid_captions.csv, test_captions.csv and the images per split"
EXPECTED_V1 = (
    "data/{train,validation,test}/radiology/captions.txt with images/ beside them, "
    "or {train,valid,test}_captions.txt and the images"
)

FEATURES = ("caption", "concepts", "modality", "location", "plane")
TABLES = ("modality", "location", "plane", "content_type")

# Manually assigned concepts: how the image was made and, for plain X-rays, what it shows and from which
# direction. ImageCLEFmedical evaluates manual concepts by this list; the names are UMLS'.
MODALITIES = {
    "C0040405": "CT",
    "C1306645": "X-ray",
    "C0024485": "MRI",
    "C0041618": "Ultrasound",
    "C0002978": "Angiography",
    "C0032743": "PET",
    "C0920367": "OCT",
}
LOCATIONS = {
    "C0817096": "Chest",
    "C0000726": "Abdomen",
    "C0030797": "Pelvis",
    "C0037303": "Skull",
    "C0037949": "Spine",
    "C1140618": "Upper extremity",
    "C0023216": "Lower extremity",
    "C0006141": "Breast",
}
PLANES = {"C1999039": "AP", "C1996865": "PA", "C0205129": "Sagittal"}

_SUFFIXES = (".jpg", ".png", ".jpeg")


def captions_v2(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Split -> its file of captions, for the splits that exist."""
    return _present(folder, "{0}_captions.csv", "{0}/{0}_captions.csv")


def captions_v1(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """As `captions_v2`, for ROCO v1."""
    return _present(
        folder,
        "data/{0}/radiology/captions.txt",
        "all_data/{0}/radiology/captions.txt",
        "{0}/radiology/captions.txt",
        "{0}_captions.txt",
        "{0}/captions.txt",
    )


def _present(folder: pathlib.Path, *patterns: str) -> dict[str, pathlib.Path]:
    found = {}
    for split, names in SPLITS.items():
        path = first_there(folder, *(p.format(n) for p in patterns for n in names))
        if path is not None:
            found[split] = path
    return found


def check_v2(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` if it has ROCOv2's captions; DataError says what was found instead."""
    folder = files.given_folder(folder, EXPECTED_V2)
    if not captions_v2(folder):
        hint = "; this is ROCO v1: build roco_v1" if captions_v1(folder) else files.did_you_mean(folder, captions_v2)
        raise DataError(f"{folder}: no file of captions found; expected {EXPECTED_V2}{hint}")
    return folder


def check_v1(folder: pathlib.Path | str) -> pathlib.Path:
    """As `check_v2`, for ROCO v1."""
    folder = files.given_folder(folder, EXPECTED_V1)
    if not captions_v1(folder):
        hint = "; this is ROCOv2: build rocov2" if captions_v2(folder) else files.did_you_mean(folder, captions_v1)
        raise DataError(f"{folder}: no file of captions found; expected {EXPECTED_V1}{hint}")
    return folder


def read_v2(folder: pathlib.Path | str) -> Release:
    """Reads captions and concepts of ROCOv2; finds the images but doesn't open them.

    Features: caption, concepts (UMLS ids joined by ";"), modality, location, plane (manual concepts, see
    above; several joined by ", "); "" if unknown.

    Raises:
      DataError: as `check_v2`; a table with another header or a row of another width; a duplicate id.
    """
    folder = check_v2(folder)
    figures, images, notes, captions = {}, {}, {}, set()
    for split, path in captions_v2(folder).items():
        name = path.name.removesuffix("_captions.csv")
        kinds = {kind: _concepts(path.parent, name, kind) for kind in ("", "_manual")}
        figures[split] = {}
        for where, image_id, caption in _table(path, "Caption"):
            found = {kind: (table or {}).get(image_id, ()) for kind, table in kinds.items()}
            cuis = tuple(dict.fromkeys((*found[""], *found["_manual"])))
            add_figure(figures[split], caption_figure(image_id, caption, cuis, captions), where)
        notes[split] = {"captions_file": path.name, **_ids(figures[split])}
        for kind, table in kinds.items():
            if table is None:
                continue
            notes[split][f"concepts{kind}"] = {
                "ids_without_caption": len(table.keys() - figures[split].keys()),
                "captions_without_id": len(figures[split].keys() - table.keys()),
                "empty": sum(not cuis for cuis in table.values()),
            }
        images[split] = _images(folder, SPLITS[split])
    release = Release(figures, images, notes)
    check_disjoint(release, folder)
    return release


def read_v1(folder: pathlib.Path | str) -> Release:
    """Reads captions and concepts of ROCO v1; features as in `read_v2`.

    The data set's download script names an image after article and figure; `dlinks.txt` next to the
    captions maps them to ids. Images named by their id are found too.

    Raises:
      DataError: as `check_v1`; a duplicate id; a file that isn't UTF-8.
    """
    folder = check_v1(folder)
    figures, images, notes, captions = {}, {}, {}, set()
    for split, path in captions_v1(folder).items():
        links = _dlinks(path.parent)
        table = {
            image_id: tuple(c for c in rest.split("\t") if c.strip())
            for _, image_id, rest in _tab_separated(first_there(path.parent, "cuis.txt"))
        }
        figures[split], bad = {}, []
        for where, image_id, caption in _tab_separated(path):
            if not image_id:
                bad.append(where.rsplit(" ", 1)[-1])
                continue
            # Each caption has a space before it: that is the format, not a repair to report.
            caption = caption.removeprefix(" ")
            cuis, link = table.get(image_id, ()), links.get(image_id, ())
            figure = caption_figure(image_id, caption, cuis, captions, *link)
            add_figure(figures[split], figure, where)
        notes[split] = {"captions_file": path.relative_to(folder).as_posix()}
        if bad:
            notes[split]["lines_without_tab"] = {"count": len(bad), "first": bad[:10]}
        beside = first_there(path.parent, "images", "images.zip") if path.parent != folder else None
        images[split] = beside or _images(folder, SPLITS[split])
    release = Release(figures, images, notes)
    check_disjoint(release, folder)
    return release


def caption_figure(
    image_id: str,
    caption: str,
    cuis: tuple[str, ...],
    captions: set[str],
    file: str = "",
    paper: str = "",
) -> Figure:
    """A figure with what its concepts say; its caption is added to `captions`, those of the figures so far."""
    text = caption.strip()
    flags = []
    if has_text(text):
        if caption != text:
            flags.append("spaces around the caption")
        if text in captions:
            flags.append(CAPTION_AGAIN)
        captions.add(text)
    named = {
        key: ", ".join(names[c] for c in cuis if c in names)
        for key, names in (("modality", MODALITIES), ("location", LOCATIONS), ("plane", PLANES))
    }
    return Figure(
        image_id,
        (*(image_id + s for s in _SUFFIXES), *([file] if file else [])),
        {"caption": text if has_text(text) else "", "concepts": ";".join(cuis), **named},
        no_caption="" if has_text(text) else "blank caption",
        flags=tuple(flags),
        groups=(("paper", paper),) if paper else (),
    )


def _table(path: pathlib.Path, column: str) -> Iterator[tuple[str, str, str]]:
    """(where, id, text) of a CSV file with the header `ID,<column>`."""
    text = files.read_text(path, f"a table ID,{column}")
    header, rows = tables.read(io.StringIO(text, newline=""), path, error=DataError)
    if header != ["ID", column]:
        raise DataError(f"{path}: header {header}; expected ID,{column}")
    for line, row in rows:
        if isinstance(row, str):
            raise DataError(f"{path} line {line}: {row}; expected ID,{column}")
        if not row["ID"].strip():
            raise DataError(f"{path} line {line}: no ID in {row!r:.80}; expected ID,{column}")
        yield f"{path} line {line}", row["ID"].strip(), row[column]


def _concepts(folder: pathlib.Path, name: str, kind: str) -> dict[str, tuple[str, ...]] | None:
    """id -> CUIs of `<name>_concepts<kind>.csv`; None if there is no such file."""
    path = folder / f"{name}_concepts{kind}.csv"
    if not path.is_file():
        return None
    return {
        image_id: tuple(c.strip() for c in cuis.split(";") if c.strip()) for _, image_id, cuis in _table(path, "CUIs")
    }


def _tab_separated(path: pathlib.Path | None) -> Iterator[tuple[str, str, str]]:
    """(where, id, rest) of lines `id TAB rest`; the id is "" in a line without a tab."""
    if path is None:
        return
    for i, line in enumerate(files.read_text(path, "lines of id, tab, text").split("\n"), 1):
        if line.strip():
            image_id, tab, rest = line.rstrip("\r").partition("\t")
            yield f"{path} line {i}", image_id.strip() if tab else "", rest


def _dlinks(folder: pathlib.Path) -> dict[str, tuple[str, str]]:
    """id -> (file name that the download script gives the image, article), from `dlinks.txt`."""
    found = {}
    for _, image_id, rest in _tab_separated(first_there(folder, "dlinks.txt")):
        paper, file = re.search(r"PMC\d+", rest), rest.split("\t")[-1].strip()
        if image_id and paper and file:
            found[image_id] = f"{paper[0]}_{file}", paper[0]
    return found


def _images(folder: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
    """Where a split's images are: a folder or zip file for the split, else one for all splits."""
    of_split = [p.format(n) for n in names for p in ("{0}", "{0}_images", "images/{0}")]
    candidates = [*of_split, *(f"{c}.zip" for c in of_split), "images", "images.zip"]
    return first_there(folder, *candidates)


def _ids(figures: dict[str, Figure]) -> dict[str, int]:
    """Counts gaps in the ids' numbers, which the release has too, so that the report shows them."""
    numbers = [int(m[0]) for i in figures if (m := re.search(r"\d+$", i))]
    if not numbers:
        return {}
    gaps = max(numbers) - min(numbers) + 1 - len(set(numbers))
    return {"first_number": min(numbers), "last_number": max(numbers), "numbers_left_out": gaps}
