"""Reads MIMIC-CXR's tables: split, views, and the sections of the reports that MIT-LCP's script cuts out.

Written after the documented layout; nothing of the data is in this project, its tests included.
"""

import gzip
import pathlib
import re
import zlib
from collections.abc import Iterator

from data_prep import files
from data_prep.builders import reports
from data_prep.builders.questioned import Asked
from data_prep.files import DataError
from paligemma_med.pp import tables

SECTIONS = "mimic_cxr_sectioned.csv"
EXPECTED = (
    "files/, mimic-cxr-2.0.0-split.csv.gz and mimic-cxr-2.0.0-metadata.csv.gz of MIMIC-CXR-JPG, and "
    f"{SECTIONS}, made of MIMIC-CXR's reports by create_section_files.py of https://github.com/MIT-LCP/mimic-cxr"
)
PARTS = ("findings", "impression", "comparison", "last_paragraph")
FEATURES = ("content_type", "study_id", "patient_id", "view", *PARTS)
FRONTAL = ("AP", "PA")
_SPLITS = {"train": "train", "validate": "validate", "test": "test"}
_SUFFIXES = (".jpg", ".png", ".dcm")


def table(folder: pathlib.Path, kind: str) -> pathlib.Path | None:
    """The table "split" or "metadata" of any version, gzipped or not."""
    found = sorted(p for p in folder.glob(f"mimic-cxr-2.*-{kind}.csv*") if p.name.endswith((".csv", ".csv.gz")))
    return found[0] if found else None


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it has all files. DataError: what is missing."""
    folder = files.given_folder(folder, EXPECTED)
    there = {"split": table(folder, "split"), "metadata": table(folder, "metadata")}
    missing = [f"mimic-cxr-2.…-{kind}.csv.gz" for kind, path in there.items() if path is None]
    missing += [] if _sections(folder) else [SECTIONS]
    missing += [] if (folder / "files").is_dir() else ["files/"]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} not found; expected {EXPECTED}")
    return folder


def _sections(folder: pathlib.Path) -> pathlib.Path | None:
    return next((p for name in (SECTIONS, f"{SECTIONS}.gz") if (p := folder / name).is_file()), None)


def rows(folder: pathlib.Path, target: str, frontal_only: bool) -> Iterator[Asked]:
    """All images of the split's table with their studies' reports.

    Args:
      folder: see `check_folder`.
      target: a key of `reports.TARGETS`.
      frontal_only: drop images whose view isn't AP or PA.

    Raises:
      DataError: a table of another form, or damaged.
    """
    sections = {
        row["study"].strip().lower(): {part: " ".join(row[part].split()) for part in PARTS}
        for _, row in read_table(_sections(folder), ("study", *PARTS))
    }
    views = {
        row["dicom_id"]: row["ViewPosition"].strip().upper()
        for _, row in read_table(table(folder, "metadata"), ("dicom_id", "ViewPosition"))
    }
    for where, row in read_table(table(folder, "split"), ("dicom_id", "study_id", "subject_id", "split")):
        if row["split"] not in _SPLITS:
            raise DataError(f"{where}: split is {row['split']!r:.40}; expected one of {', '.join(_SPLITS)}")
        if bad := [k for k in ("study_id", "subject_id") if not re.fullmatch("[0-9]{3,12}", row[k])]:
            raise DataError(f"{where}: {bad[0]} is {row[bad[0]]!r:.40}; expected a number")
        if not re.fullmatch("[0-9A-Za-z-]{1,80}", row["dicom_id"]):
            raise DataError(f"{where}: dicom_id is {row['dicom_id']!r:.40}; expected letters, digits and hyphens")
        yield _row(
            folder, row, sections.get(f"s{row['study_id']}"), views.get(row["dicom_id"], ""), target, frontal_only
        )


def _row(folder: pathlib.Path, row, parts, view: str, target: str, frontal_only: bool) -> Asked:
    study, subject = f"s{row['study_id']}", f"p{row['subject_id']}"
    stem = f"{subject[:3]}/{subject}/{study}/{row['dicom_id']}"
    question, answer = reports.asked(parts or {}, target)
    features = {
        **(parts or dict.fromkeys(PARTS, "")),
        "question_id": row["dicom_id"],
        "image_id": stem,
        "question": question,
        "answer": answer,
        "answer_type": "OPEN",
        "content_type": target.capitalize(),
        "study_id": study,
        "patient_id": subject,
        "view": view,
    }
    dropped = "" if parts else "no report of the study"
    dropped = dropped or ("" if answer else f"no {target}")
    if frontal_only and not dropped and view not in FRONTAL:
        dropped = "not a frontal view"
    image = next((stem + s for s in _SUFFIXES if (folder / "files" / (stem + s)).is_file()), stem + _SUFFIXES[0])
    flags = ("words removed from the report, ___",) if "___" in answer else ()
    groups = (("patient", subject), *reports.groups(study, answer))
    return Asked(row["split"], "files", image, features, dropped, flags, groups)


def read_table(path: pathlib.Path, needed: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a CSV file, gzipped or not.

    Raises:
      DataError: it lacks a column of `needed`; it is damaged; a row has another width.
    """
    try:
        opened = gzip.open(path, "rt", encoding="utf-8-sig", newline="") if path.suffix == ".gz" else None
        with opened or open(path, encoding="utf-8-sig", newline="") as f:
            columns, found = tables.read(f, path, error=DataError)
            if missing := [c for c in needed if c not in columns]:
                raise DataError(f"{path}: column {', '.join(missing)} missing; expected {', '.join(needed)}")
            for line, row in found:
                if isinstance(row, str):
                    raise DataError(f"{path} line {line}: {row}; expected {', '.join(needed)}")
                yield f"{path} line {line}", row
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 text ({e.reason}); expected a table") from None
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: can't be read ({e}); expected a table") from None
