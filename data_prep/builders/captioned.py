"""The TFDS builder that `rocov2`, `roco_v1` and `medpix2` share: configs `caption` and `qa`.

Two passes, as in `row_file`: first the rows are made, checked and counted, so that a bad file doesn't
leave a half-written data set; then they are written with their images.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_prep import ledger, qa_files
from data_prep.builders import leaks, row_file
from data_prep.builders.figures import SPLITS, Figure, Release, first_there
from data_prep.builders.vqa import Option, VqaBuilder, vqa_features
from data_prep.files import DataError
from data_prep.images import convert as images
from data_prep.images import store as image_store
from data_prep.images.checked import CheckedImages
from data_prep.images.store import Store
from data_prep.progress import progress
from paligemma_med.pp.rows import ANSWER_LETTER
from paligemma_med.pp.rows import CHOICES as TEXTS

CAPTION_QUESTION = "Describe this image."
QA_FILES = ("qa.jsonl", "qa.json", "qa.csv", "qa_pairs_generated_all.json")
CHOICES = (*TEXTS, ANSWER_LETTER)
_EXAMPLES = 3
# MedM's csv files name a split that their authors made; ours are the release's.
_THEIR_SPLITS = {s: s for s in SPLITS} | {"valid": "validate", "validation": "validate"}


class CaptionedBuilder(VqaBuilder, skip_registration=True):
    """Subclasses define FEATURES, TABLES, HOMEPAGE, LICENSE, `check_manual_dir` and `read_release`.

    FEATURES: text features of a figure; TABLES: the features whose values the report counts.
    """

    CAN_BEAM = True
    FEATURES: Sequence[str] = ()
    TABLES: Sequence[str] = ()
    HOMEPAGE = LICENSE = ""
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="caption", description="One row per image and caption"),
        # A separate version, so that captions needn't be built again.
        tfds.core.BuilderConfig(
            name="qa",
            version=tfds.core.Version("1.1.0"),
            release_notes={
                "1.0.0": "First version.",
                "1.1.0": "choice_a to choice_d and answer_letter, for multiple choice.",
            },
            description="Question-answer pairs made from them",
        ),
    ]
    OPTIONS = {
        "qa": Option(None, f"file(s,) of question-answer pairs; else {QA_FILES[0]} in manual_dir."),
        "allow_missing_images": Option(False, "leave out rows whose image is missing or broken, and absent splits."),
    }

    @classmethod
    def read_release(cls, folder: pathlib.Path) -> Release:
        """Reads everything except the images' content."""
        raise NotImplementedError

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        # Without a file of pairs in the folder, `qa` is only built with --config=qa --qa=FILE.
        return [c for c in cls.builder_configs if c == "caption" or first_there(folder, *QA_FILES)]

    @classmethod
    def describe(cls, report: Mapping[str, Any]) -> Sequence[str]:
        return describe(report)

    def _info(self) -> tfds.core.DatasetInfo:
        names = (*self.FEATURES, "content_type", "qa_rule", "qa_mode")
        if self.builder_config.name == "qa":
            names += CHOICES
        return self.dataset_info_from_configs(
            features=vqa_features(**{name: tfds.features.Text() for name in names}),
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = pathlib.Path(dl_manager.manual_dir)
        qa = None
        if self.builder_config.name == "qa":
            given, inside = self.options["qa"], first_there(folder, *QA_FILES)
            qa = given.split(",") if given else [inside] if inside else None
            if qa is None:
                raise DataError(
                    f"{folder}: config qa needs question-answer pairs; expected "
                    f"--qa=FILE or one of {', '.join(QA_FILES)} there (--config=caption builds "
                    "without)"
                )
        elif self.options["qa"]:
            raise DataError("--qa is for config qa; add --config=qa")
        made, report = make_rows(
            self.read_release(folder),
            folder,
            qa,
            tables=self.TABLES,
            allow_missing=self.options["allow_missing_images"],
            work_dir=pathlib.Path(dl_manager.download_dir) / "rows",
            cache_dir=self.cache_dir,
        )
        self.report = {"dataset": self.info.full_name, **report}
        return {
            split: row_file.generate(rows, functools.partial(example, store), f"writing {split}", self.beam)
            for split, (rows, store) in made.items()
        }

    def _generate_examples(self, *args: Any) -> Any:
        raise NotImplementedError("Rows come from _split_generators.")


def example(store: Store, row: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """(key, TFDS example) of a row that `make_rows` wrote."""
    features = {k: v for k, v in row.items() if k != "file"}
    content = images.convert_checked(store.read(row["file"]), row["file"])
    return row["question_id"], {**features, "image": content}


def make_rows(
    release: Release,
    folder: pathlib.Path,
    qa: Sequence[pathlib.Path | str] | None,
    *,
    tables: Sequence[str] = (),
    allow_missing: bool = False,
    work_dir: pathlib.Path,
    cache_dir: pathlib.Path | None = None,
) -> tuple[dict[str, tuple[row_file.RowWriter, Store]], dict[str, Any]]:
    """Makes the rows of a data set, each image decoded once, and the report.

    Args:
      release: what the reader found in `folder`.
      folder: for messages.
      qa: files of question-answer pairs; None: the captions are the answers.
      tables: features whose values are counted.
      allow_missing: leave out rows whose image is missing or broken, and absent splits.
      work_dir: for temporary files, which must stay until the rows are written.
      cache_dir: for results that a restarted build can reuse.

    Returns:
      {split: (its rows, the store with their images)} and the report.

    Raises:
      DataError: a split, an image or its content is missing (unless `allow_missing`); a split has no
        rows left; no pair is about an image of the release.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"folder": str(folder.resolve())}
    if absent := [s for s in SPLITS if not release.figures.get(s) and s not in release.optional]:
        if not allow_missing:
            raise DataError(
                f"{folder}: nothing found of split {', '.join(absent)}; expected all of "
                f"{', '.join(SPLITS)} (--allow_missing_images builds what is there)"
            )
    if qa is None:
        rows = {s: functools.partial(_caption_rows, f) for s, f in release.figures.items()}
    else:
        rows, report["qa"] = _sort_pairs(release, qa, work_dir)
    stores, names = _find_images(release, folder, rows, allow_missing)

    books = ledger.Ledger(SPLITS, tables)
    made, all_checked = {}, {}
    for split, store in stores.items():
        checked = CheckedImages(store, cache_dir) if store else None
        with row_file.RowWriter(work_dir / f"{split}.jsonl") as writer:
            for figure, row in progress(rows[split](), f"checking {split}"):
                books.read(split)
                reason = figure.no_caption if qa is None else ""
                if not reason and figure.image_id not in names:
                    reason = "image missing"
                if not reason:
                    try:
                        digest = checked.check(names[figure.image_id])
                    except DataError as e:
                        if not allow_missing:
                            raise DataError(f"{e} (--allow_missing_images leaves such rows out)") from None
                        reason = "image broken"
                if reason:
                    books.drop(split, reason, row["question_id"])
                    continue
                if figure.no_caption:  # a pair can still be about its case
                    books.flag(split, figure.no_caption, row["question_id"])
                for note in checked.notes(names[figure.image_id]):
                    books.flag(split, f"image: {note}", row["question_id"])
                _keep(books, split, figure, row, digest)
                writer.write({**row, "file": names[figure.image_id]})
        if checked:
            checked.close()
            all_checked[split] = checked
        if writer.count:
            made[split] = writer, store
    if qa is not None:
        leaks.book_questions(books, functools.partial(_kept, made, all_checked))
    report.update(books.to_report())
    report["splits_left_out"] = empty = [s for s in SPLITS if s not in made]
    report["notes"] = release.notes
    empty = [s for s in empty if s not in release.optional or not made]
    if empty and (not allow_missing or not made):
        why = {s: {reason: note["count"] for reason, note in report["splits"][s]["dropped"].items()} for s in empty}
        raise DataError(
            f"{folder}: no row is left for {', '.join(empty)}; expected at least one in each split; rows dropped: {why}"
        )
    return made, report


def _kept(
    made: Mapping[str, tuple[row_file.RowWriter, Store]], checked: Mapping[str, CheckedImages]
) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    for split, (writer, _) in made.items():
        for row in row_file.read_rows(writer.path):
            yield split, checked[split].check(row["file"]), row


def _caption_rows(figures: Mapping[str, Figure]) -> Iterator[tuple[Figure, dict[str, str]]]:
    for figure in figures.values():
        yield (
            figure,
            {
                **figure.features,
                "question": CAPTION_QUESTION,
                "answer": figure.features["caption"],
                "answer_type": "OPEN",
                "question_id": figure.image_id,
                "image_id": figure.image_id,
                "content_type": "",
                "qa_rule": "",
                "qa_mode": "",
            },
        )


def _sort_pairs(
    release: Release, qa: Sequence[pathlib.Path | str], work_dir: pathlib.Path
) -> tuple[dict[str, Callable[[], Iterator]], dict[str, Any]]:
    """Writes the pairs to one file per split; returns functions that read them, and the pairs' report."""
    split_of = {i: split for split, figures in release.figures.items() for i in figures}
    books = qa_files.qa_ledger()
    unknown = ""
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(row_file.RowWriter(work_dir / f"{split}.pairs.jsonl"))
            for split in release.figures
        }
        for pair in progress(qa_files.read_qa(qa, books), "reading pairs"):
            if pair.image_id not in split_of:
                unknown = unknown or pair.image_id
                books.flag("pairs", "no such image in the release, left out", pair.question_id)
                continue
            choices, problem = _choices(pair)
            if problem:
                books.flag("pairs", f"choices left out, {problem}", pair.question_id)
            writers[split_of[pair.image_id]].write(
                {
                    **choices,
                    "question": pair.question,
                    "answer": pair.answer,
                    "answer_type": pair.answer_type,
                    "question_id": pair.question_id,
                    "image_id": pair.image_id,
                    "content_type": pair.extra.get("content_type")
                    or pair.extra.get("question_type")
                    or qa_files.question_word(pair.question),
                    "qa_rule": pair.rule,
                    "qa_mode": pair.extra.get("mode", ""),
                    "split": pair.extra.get("split", ""),
                }
            )
    if not any(w.count for w in writers.values()):
        known = next(iter(split_of), "none")
        raise DataError(
            f"{', '.join(map(str, qa))}: no pair is about an image of this release; found image "
            f"ids such as {unknown or 'none'}, expected such as {known}"
        )
    rows = {split: functools.partial(_pair_rows, release.figures[split], w.path) for split, w in writers.items()}
    files = [str(pathlib.Path(p).expanduser().resolve()) for p in qa]
    return rows, {"files": files, **books.to_report()}


def _choices(pair: qa_files.Pair) -> tuple[dict[str, str], str]:
    """({key of CHOICES: text}, what is wrong with them or ""); all "" without four good ones."""
    # Cleaned like the answer, which has to be one of them.
    found = {key: pair.extra.get(key, "").replace("**", "").strip() for key in CHOICES}
    *options, letter = found.values()
    letter = found[ANSWER_LETTER] = letter.upper()
    nothing = dict.fromkeys(CHOICES, "")
    if not any(options):
        return nothing, "a letter without choices" if letter else ""
    if not all(options):
        return nothing, "fewer than four"
    if len({" ".join(o.lower().split()) for o in options}) < len(options):
        return nothing, "two alike"
    if letter not in tuple("ABCD"):
        return nothing, "no letter A to D"
    if options["ABCD".index(letter)] != pair.answer:
        return nothing, "the letter's isn't the answer"
    return found, ""


def _pair_rows(figures: Mapping[str, Figure], path: pathlib.Path) -> Iterator[tuple[Figure, dict[str, str]]]:
    for row in row_file.read_rows(path):
        figure = figures[row["image_id"]]
        yield figure, {**figure.features, **row}


def _find_images(
    release: Release,
    folder: pathlib.Path,
    rows: Mapping[str, Callable[[], Iterator]],
    allow_missing: bool,
) -> tuple[dict[str, Store | None], dict[str, str]]:
    """The splits' stores, and image id -> file name in them, for all images that rows use."""
    stores, names, missing, total = {}, {}, [], 0
    for split in rows:
        root = release.images.get(split)
        stores[split] = image_store.open_store(root, by_name=True) if root else None
        figures = {figure.image_id: figure for figure, row in rows[split]() if row["answer"]}
        total += len(figures)
        for figure in figures.values():
            try:
                name = next((n for n in figure.names if root and stores[split].has(n)), None)
            except DataError as e:
                raise DataError(f"{folder}: image id {figure.image_id!r}: {e}") from None
            if name is not None:
                names[figure.image_id] = name
            else:
                missing.append(figure.image_id)
    if missing and not allow_missing:
        where = ", ".join(sorted({str(p or folder) for p in release.images.values()}))
        raise DataError(
            f"{where}: {len(missing):,} of {total:,} images are missing, e.g. "
            f"{', '.join(missing[:_EXAMPLES])}; expected all of them (--allow_missing_images "
            "builds what is there)"
        )
    return stores, names


def _keep(books: ledger.Ledger, split: str, figure: Figure, row: dict[str, str], digest: bytes) -> None:
    books.keep(split, row)
    for flag in figure.flags:
        books.flag(split, flag, row["question_id"])
    theirs = row.pop("split", "").strip().lower()
    if theirs and _THEIR_SPLITS.get(theirs) != split:
        # Pairs go to the split that the release puts their image in.
        books.flag(split, f"in split {theirs} of the file of pairs", row["question_id"])
    books.member(split, "image", digest, figure.image_id)
    for kind, key in figure.groups:
        books.member(split, kind, key, key)
    if caption := figure.features.get("caption"):
        books.member(split, "caption", caption, figure.image_id)
        if near := leaks.near_caption(caption):
            books.member(split, leaks.NEAR_CAPTION, near, figure.image_id)


def describe(report: Mapping[str, Any]) -> Sequence[str]:
    """The report as lines for a person."""
    lines = list(ledger.describe(report))
    if qa := report.get("qa"):
        lines.append(f"pairs from {', '.join(qa['files'])}:")
        for line in ledger.describe({**qa, "shared": {}}):
            lines.append(f"  {line}")
        rules = qa["splits"]["pairs"]["tables"]["rule"]
        lines.append(f"  by rule: {', '.join(f'{rule} {n:,}' for rule, n in rules.items())}")
    if left_out := report["splits_left_out"]:
        lines.append(f"WARNING: without {', '.join(left_out)}: nothing was there to build")
    for key, note in report["notes"].items():
        lines.append(f"{key}: {_note(note)}")
    return lines


def _note(note: Any) -> str:
    if not isinstance(note, Mapping):
        return f"{note:,}" if isinstance(note, int) else str(note)
    return ", ".join(
        f"{key} ({_note(v)})" if isinstance(v, Mapping) else f"{key} {_note(v)}" for key, v in note.items()
    )
