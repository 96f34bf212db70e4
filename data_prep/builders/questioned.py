"""The TFDS builder of data sets that are questions about images, whatever their files look like.

A data set's reader gives `Asked` rows; here they are checked, counted and written. Two passes, as in `captioned`: a bad
file doesn't leave a half-written data set, each image is decoded once, and memory holds texts, never images.
"""

import collections
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_prep import ledger
from data_prep.builders import leaks, row_file
from data_prep.builders.leaks import plain
from data_prep.builders.vqa import Option, VqaBuilder, vqa_features
from data_prep.files import DataError
from data_prep.images import convert as images
from data_prep.images.checked import CheckedImages
from data_prep.images.store import Store
from data_prep.progress import progress

SPLITS = ("train", "validate", "test")
ALLOW_MISSING = Option(False, "leave out rows whose image is missing or broken.")
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Asked:
    """One row of a release.

    split: the release's; "" if `Questions.place` says it.
    root: which of `Questions.images` has its image.
    image: the image's name there; "" if none is named.
    features: all texts by name, question_id, image_id, question, answer and answer_type among them; and what
      `QuestionedBuilder.other_features` names, as JSON can hold it.
    dropped: why it can't be used; "" if it can.
    flags: what the report should mention about it.
    groups: (kind, key) that shouldn't be in two splits, such as ("article", "PMC212319"); or (kind, key, name to show).
    """

    split: str
    root: str
    image: str
    features: dict[str, Any]
    dropped: str = ""
    flags: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a reader found.

    asked: all rows, in the order of the files; gone through twice: a list, or `Again` where that would be large.
    images: stores by name.
    place: (row, 16 bytes that identify its image's content) → split, where the release has no splits.
    notes: for the report, {what: text or number}.
    absent: splits that the folder has no files for.
    may_be_empty: whether a split may be, since they are drawn by the reader, or the release has only one.
    captions: whether all are asked the same, so that only images and groups are compared between splits.
    """

    asked: Iterable[Asked]
    images: Mapping[str, Store]
    place: Callable[[Asked, bytes], str] | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    may_be_empty: bool = False
    captions: bool = False


@dataclasses.dataclass(frozen=True)
class Again:
    """Rows that are read anew each time they are gone through, of a function that gives an iterator."""

    read: Callable[[], Iterator[Asked]]

    def __iter__(self) -> Iterator[Asked]:
        return self.read()


def drawn_split(key: str | bytes, validate: float, test: float, seed: int) -> str:
    """The split of an image or article by a hash of seed and key alone: more data doesn't move what is there.

    Raises:
      DataError: the shares aren't at least 0, and at most 1 together.
    """
    if not (validate >= 0 and test >= 0 and validate + test <= 1):
        raise DataError(
            f"validate_fraction is {validate} and test_fraction {test}; expected at least 0, and at most 1 together"
        )
    content = key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")
    place = int.from_bytes(hashlib.sha256(f"{seed} ".encode() + content).digest()[:8]) / 2**64
    return "test" if place < test else "validate" if place < test + validate else "train"


class QuestionedBuilder(VqaBuilder, skip_registration=True):
    """Subclasses define FEATURES, TABLES, HOMEPAGE, LICENSE, `check_manual_dir` and `read_questions`.

    FEATURES: texts beside those that every set has; TABLES: features whose values the report counts.
    """

    CAN_BEAM = True
    FEATURES: Sequence[str] = ()
    TABLES: Sequence[str] = ()
    HOMEPAGE = LICENSE = ""
    OPTIONS: Mapping[str, Option] = {"allow_missing_images": ALLOW_MISSING}

    def read_questions(self, folder: pathlib.Path) -> Questions:
        """Reads everything except the images' content."""
        raise NotImplementedError

    @classmethod
    def other_features(cls) -> Mapping[str, Any]:
        """Features that are no texts."""
        return {}

    @classmethod
    def describe(cls, report: Mapping[str, Any]) -> Sequence[str]:
        lines = list(ledger.describe(report))
        if left_out := report["splits_left_out"]:
            lines.append(f"WARNING: without {', '.join(left_out)}: nothing was there to build")
        notes = report["notes"].items()
        return lines + [f"{what}: {note:,}" if isinstance(note, int) else f"{what}: {note}" for what, note in notes]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=vqa_features(**dict.fromkeys(self.FEATURES, tfds.features.Text()), **self.other_features()),
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = pathlib.Path(dl_manager.manual_dir)
        found = self.read_questions(folder)
        made, report = make_rows(
            found,
            folder,
            tables=self.TABLES,
            allow_missing=self.options["allow_missing_images"],
            work_dir=pathlib.Path(dl_manager.download_dir) / "rows",
            cache_dir=self.cache_dir,
        )
        self.report = {"dataset": self.info.full_name, **report}
        make = functools.partial(example, found.images)
        return {split: row_file.generate(rows, make, f"writing {split}", self.beam) for split, rows in made.items()}

    def _generate_examples(self, *args: Any) -> Any:
        raise NotImplementedError("Rows come from _split_generators.")


def example(stores: Mapping[str, Store], row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(key, TFDS example) of a row that `make_rows` wrote."""
    content = images.convert_checked(stores[row["root"]].read(row["file"]), row["file"])
    return row["features"]["question_id"], {**row["features"], "image": content}


def make_rows(
    found: Questions,
    folder: pathlib.Path,
    *,
    tables: Sequence[str] = (),
    allow_missing: bool = False,
    work_dir: pathlib.Path,
    cache_dir: pathlib.Path | None = None,
) -> tuple[dict[str, row_file.RowWriter], dict[str, Any]]:
    """Checks and counts the rows of a data set, each image decoded once, and writes them to `work_dir`.

    Returns:
      {split: its rows} of the splits that have any, and the report.

    Raises:
      DataError: a split, an image or its content is missing (unless `allow_missing`); a split has no row left; a
        question id comes twice.
    """
    if found.absent and not allow_missing:
        raise DataError(
            f"{folder}: nothing found of split {', '.join(found.absent)}; expected all of {', '.join(SPLITS)} "
            "(--allow_missing_images builds what is there)"
        )
    _refuse_missing(found, folder, allow_missing)
    work_dir.mkdir(parents=True, exist_ok=True)
    books = ledger.Ledger(SPLITS, tables)
    checked = {root: CheckedImages(store, cache_dir) for root, store in found.images.items()}
    writers = {split: row_file.RowWriter(work_dir / f"{split}.jsonl") for split in SPLITS}
    seen, ids = set(), set()
    unplaced = collections.defaultdict(list)
    try:
        for row in progress(found.asked, "checking rows and images"):
            if (qid := row.features["question_id"]) in ids:
                raise DataError(f"{folder}: question id {qid!r} comes twice; expected each once")
            ids.add(qid)
            digest, reason = _digest(row, found, checked, allow_missing)
            if reason:
                unplaced[reason].append(row) if not row.split else _drop(books, row.split, reason, qid)
                continue
            split = row.split or found.place(row, digest)
            books.read(split)
            _keep(books, split, row, digest, checked[row.root].notes(row.image), seen)
            writers[split].write(dict(features=row.features, file=row.image, root=row.root))
    finally:
        for part in (*checked.values(), *writers.values()):
            part.__exit__() if isinstance(part, row_file.RowWriter) else part.close()
    if not found.captions:
        leaks.book_questions(books, functools.partial(_kept, writers, checked))
    for reason, rows in unplaced.items():  # without an image nothing says the split
        for row in rows:
            _drop(books, SPLITS[0], reason, row.features["question_id"])
    made = {split: writer for split, writer in writers.items() if writer.count}
    report = {"folder": str(folder.resolve()), **books.to_report(), "notes": dict(found.notes)}
    report["splits_left_out"] = [s for s in SPLITS if s not in made]
    dropped = {s: {reason: n["count"] for reason, n in part["dropped"].items()} for s, part in report["splits"].items()}
    empty = [s for s in report["splits_left_out"] if found.place is None and not found.may_be_empty]
    if not made or (empty and not allow_missing):
        raise DataError(
            f"{folder}: no row is left for {', '.join(empty or SPLITS)}; expected at least one in each split; rows "
            f"dropped: {dropped}"
        )
    return made, report


def _kept(
    writers: Mapping[str, row_file.RowWriter], checked: Mapping[str, CheckedImages]
) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    for split, writer in writers.items():
        for row in row_file.read_rows(writer.path):
            yield split, checked[row["root"]].check(row["file"]), row["features"]


def _refuse_missing(found: Questions, folder: pathlib.Path, allow: bool) -> None:
    """DataError if images are missing: how many, before hours go into decoding the others."""
    if allow:
        return
    names = dict.fromkeys((row.root, row.image) for row in found.asked if row.image and not row.dropped)
    missing = [name for root, name in names if not _has(found, root, name)]
    if missing:
        where = ", ".join(sorted({str(store.root) for store in found.images.values()})) or str(folder)
        raise DataError(
            f"{where}: {len(missing):,} of {len(names):,} images are missing, e.g. {', '.join(missing[:_EXAMPLES])}; "
            "expected all of them (--allow_missing_images leaves their rows out)"
        )


def _has(found: Questions, root: str, name: str) -> bool:
    return root in found.images and found.images[root].has(name)


def _digest(row: Asked, found: Questions, checked: Mapping[str, CheckedImages], allow: bool) -> tuple[bytes, str]:
    """(what identifies the image's content, why the row is dropped or "")."""
    if row.dropped:
        return b"", row.dropped
    if empty := [k for k in ("question", "answer") if not row.features[k].strip()]:
        return b"", f"no {' and no '.join(empty)}"
    if not row.image:
        return b"", "no image named"
    if not _has(found, row.root, row.image):
        return b"", "image missing"
    try:
        return checked[row.root].check(row.image), ""
    except DataError as e:
        if not allow:
            raise DataError(f"{e} (--allow_missing_images leaves such rows out)") from None
        return b"", "image broken"


def _drop(books: ledger.Ledger, split: str, reason: str, qid: str) -> None:
    books.read(split)
    books.drop(split, reason, qid)


def _keep(books: ledger.Ledger, split: str, row: Asked, digest: bytes, notes: Sequence[str], seen: set) -> None:
    features, qid = row.features, row.features["question_id"]
    books.keep(split, features)
    question = f"{split} {digest.hex()} {plain(features['question'])}"
    again = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    flags = [*row.flags, *(f"image: {note}" for note in notes)]
    if again in seen:
        flags.append("asked before about the same image")
    seen.add(again)
    for flag in flags:
        books.flag(split, flag, qid)
    books.member(split, "image", digest, features["image_id"])
    for kind, key, *name in row.groups:
        books.member(split, kind, key, name[0] if name else key)
