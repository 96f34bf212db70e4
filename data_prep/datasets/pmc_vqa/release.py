"""Reads a release of PMC-VQA into checked rows on disk, split by split, and the report.

Three passes, so that memory doesn't grow with the release: the tables (is every row a question, does its
image exist?), the images (each decoded once), and the splits. PMC-VQA has no validation set; one is
taken from train by whole articles, and articles that share images stay together.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from data_prep import files, ledger
from data_prep.builders import leaks
from data_prep.builders.row_file import RowWriter, read_rows
from data_prep.datasets.pmc_vqa import rows
from data_prep.datasets.pmc_vqa.rows import LETTERS, Question
from data_prep.files import DataError
from data_prep.images import store as image_store
from data_prep.images.checked import CheckedImages
from data_prep.images.store import Store
from data_prep.progress import progress
from paligemma_med.pp.rows import ANSWER_LETTER, CHOICES

SPLITS = ("train", "validate", "test")
TABLES = {"v1": ("train.csv", "test.csv"), "v2": ("train_2.csv", "test_2.csv")}
CLEAN_TEST = "test_clean.csv"
# Where images are looked for, in this order; images_2.zip unpacks to figures/.
IMAGES = {
    "v1": ("images", "images.zip"),
    "v2": ("images_2", "figures", "images_2.zip", "images", "images.zip"),
}
EXPECTED = (
    "train.csv, test.csv and images.zip or images/ (v1), or train_2.csv, test_2.csv and images_2.zip or figures/ (v2)"
)


@dataclasses.dataclass(frozen=True)
class Release:
    """Kept rows by split (`features` without the image), their images, and the report."""

    rows: dict[str, RowWriter]
    images: Store
    report: dict[str, Any]


def versions_in(folder: pathlib.Path) -> list[str]:
    """The versions whose tables are in `folder`."""
    return [v for v, names in TABLES.items() if all((folder / n).is_file() for n in names)]


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path; DataError unless it holds the tables of a release."""
    folder = files.given_folder(folder, EXPECTED)
    if not versions_in(folder):
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"{folder}: found {found}; expected {EXPECTED}")
    return folder


def open_images(folder: pathlib.Path, version: str, given: str | None) -> Store:
    """The store of a version's images; `given` names another place."""
    if given is not None:
        return image_store.open_store(given, by_name=True)
    for name in IMAGES[version]:
        if (folder / name).exists():
            return image_store.open_store(folder / name, by_name=True)
    raise DataError(
        f"{folder}: found none of {', '.join(IMAGES[version])}; expected the images of {version} "
        "there, or their folder or zip file as --images"
    )


def read_release(
    folder: pathlib.Path | str,
    version: str,
    *,
    blank: bool,
    options: Mapping[str, Any],
    work_dir: pathlib.Path,
    cache_dir: pathlib.Path | None = None,
) -> Release:
    """Reads and checks one release.

    Args:
      folder: where the tables are.
      version: "v1" or "v2".
      blank: questions without their options.
      options: the builder's, see there.
      work_dir: for temporary files, which must stay until the rows are written.
      cache_dir: for results that a restarted build can reuse.

    Raises:
      DataError: see `rows.read_table`; images missing or broken without
        `allow_missing_images`; a split without rows.
    """
    folder = check_folder(folder)
    fraction = options["validate_fraction"]
    if not 0 <= fraction < 1:
        raise DataError(f"validate_fraction is {fraction}; expected at least 0 and less than 1")
    tables = {s: folder / n for s, n in zip(("train", "test"), TABLES[version])}
    if options["test_clean"]:
        if version != "v1":
            raise DataError(f"test_clean: {version} has no {CLEAN_TEST}; it belongs to v1")
        tables["test"] = folder / CLEAN_TEST
    images = open_images(folder, version, options["images"])
    work_dir.mkdir(parents=True, exist_ok=True)
    asked = {}
    for split, table in tables.items():
        with RowWriter(work_dir / f"{split}.asked.jsonl") as asked[split]:
            for question in _questions(table, version, blank):
                _find_image(question, images)
                asked[split].write(dataclasses.asdict(question))
    _refuse_missing(asked.values(), images, options["allow_missing_images"])

    checked = CheckedImages(images, cache_dir)
    articles = _Articles()
    kept = {split: RowWriter(work_dir / f"{split}.jsonl") for split in SPLITS}
    books = ledger.Ledger(SPLITS, (ANSWER_LETTER,))
    try:
        _check_images(asked, checked, articles, options["allow_missing_images"])
        validate = articles.share(fraction, options["seed"])
        for split in asked:
            seen: set[bytes] = set()
            for row in read_rows(asked[split].path):
                question = Question(**row)
                into = "validate" if split == "train" and validate(question.paper) else split
                _book(question, into, books, checked, seen, kept[into], options)
    finally:
        checked.close()
        for writer in kept.values():
            writer.__exit__()
    leaks.book_questions(books, functools.partial(_kept_rows, kept, checked))
    kept = {s: w for s, w in kept.items() if s != "validate" or fraction}
    for split, writer in kept.items():
        if not writer.count:
            raise DataError(
                f"{folder}: no question is left for {split} of {version}; rows dropped: "
                f"{_reasons(books, split) or 'none'}; validate_fraction is {fraction}"
            )
    report = {"folder": str(folder.resolve()), "version": version, **books.to_report()}
    return Release(kept, images, report)


def _kept_rows(kept: Mapping[str, RowWriter], checked: CheckedImages) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    for split, writer in kept.items():
        for row in read_rows(writer.path):
            yield split, checked.check(row["image_id"]), row


def _questions(table: pathlib.Path, version: str, blank: bool) -> Iterator[Question]:
    for i, row in progress(rows.read_table(table), f"reading {table.name}"):
        where = f"{table} row {i}"
        question = rows.parse(row, f"{version}_{table.stem}_{i}", where, blank=blank)
        stated = (row or {}).get("split", "").strip().lower()
        if stated and not table.stem.startswith(stated):
            question.flags.append("its column `split` names another split")
        yield question


def _find_image(question: Question, images: Store) -> None:
    question.found = bool(question.image) and images.has(question.image)
    if not question.found and not question.dropped:
        question.dropped = "image missing"


def _refuse_missing(asked: Iterable[RowWriter], images: Store, allow: bool) -> None:
    missing: dict[str, None] = {}
    total = 0
    for writer in asked:
        for row in read_rows(writer.path):
            total += 1
            if row["dropped"] == "image missing":
                missing[row["image"]] = None
    if missing and not allow:
        raise DataError(
            f"{images.root}: {len(missing):,} images of {total:,} rows are missing, e.g. "
            f"{', '.join(list(missing)[:3])}; expected all of them (--allow_missing_images leaves "
            "their rows out)"
        )


def _check_images(asked: Mapping[str, RowWriter], checked: CheckedImages, articles: "_Articles", allow: bool) -> None:
    """Decodes all images, and finds which articles of train belong together.

    Images of dropped rows count too: a version's configs may drop different rows, but their validation
    sets should be the same.
    """
    total = sum(writer.count for writer in asked.values())
    every = ((s, row) for s, writer in asked.items() for row in read_rows(writer.path))
    for split, row in progress(every, "checking images", total):
        digest = None
        if row["found"]:
            try:
                digest = checked.check(row["image"])
            except DataError as e:
                if not allow and not row["dropped"]:
                    raise DataError(
                        f"{e} (first used by {row['question_id']}; --allow_missing_images leaves such rows out)"
                    ) from None
        if split == "train" and row["paper"]:
            articles.add(row["paper"], digest)


def _book(
    question: Question,
    split: str,
    books: ledger.Ledger,
    checked: CheckedImages,
    seen: set[bytes],
    writer: RowWriter,
    options: Mapping[str, Any],
) -> None:
    """Counts one row and, if it's good, writes it."""
    books.read(split)
    digest = None
    if not question.dropped:
        try:
            digest = checked.check(question.image)
        except DataError:
            question.dropped = "image broken"
    if question.dropped:
        books.drop(split, question.dropped, question.question_id)
        return
    features = question.features
    if options["shuffle_choices"]:
        features = shuffled(features, options["seed"])
    asked = hashlib.blake2b(digest + features["question"].casefold().encode(), digest_size=16)
    if asked.digest() in seen:
        question.flags.append("asked before about the same image")
    seen.add(asked.digest())
    for flag in (*question.flags, *(f"image: {note}" for note in checked.notes(question.image))):
        books.flag(split, flag, question.question_id)
    books.keep(split, features)
    books.member(split, "image", digest, question.image)
    books.member(split, "article", question.paper, question.paper)
    writer.write(features)


def shuffled(features: Mapping[str, str], seed: int) -> dict[str, str]:
    """The same question with its options in a random order given by the seed and its id."""
    key = hashlib.sha256(f"{seed} {features['question_id']}".encode()).digest()
    order = np.random.default_rng(list(key)).permutation(len(LETTERS))
    options = [features[CHOICES[i]] for i in order]
    letter = LETTERS[list(order).index(LETTERS.index(features[ANSWER_LETTER]))]
    choices = dict(zip(CHOICES, options))
    return {**features, **choices, ANSWER_LETTER: letter}


def _reasons(books: ledger.Ledger, split: str) -> str:
    dropped = books.to_report()["splits"][split]["dropped"]
    return ", ".join(f"{reason} ({note['count']:,})" for reason, note in dropped.items())


class _Articles:
    """Articles of train with their numbers of rows; those that share an image go together."""

    def __init__(self):
        self._rows = Counter()
        self._parent: dict[str, str] = {}
        self._of_image: dict[bytes, str] = {}

    def add(self, paper: str, digest: bytes | None) -> None:
        self._rows[paper] += 1
        if digest is not None:
            a, b = self._root(paper), self._root(self._of_image.setdefault(digest, paper))
            if a != b:
                self._parent[max(a, b)] = min(a, b)

    def _root(self, paper: str) -> str:
        while (parent := self._parent.get(paper, paper)) != paper:
            paper = parent
        return paper

    def share(self, fraction: float, seed: int):
        """Draws groups of articles until they have `fraction` of the rows; returns the articles drawn."""
        rows_of = Counter()
        for paper, n in self._rows.items():
            rows_of[self._root(paper)] += n
        wanted, drawn = fraction * rows_of.total(), set()
        for root in sorted(rows_of, key=lambda r: hashlib.sha256(f"{seed} {r}".encode()).digest()):
            if wanted <= 0:
                break
            drawn.add(root)
            wanted -= rows_of[root]
        return lambda paper: self._root(paper) in drawn
