"""Where captions come from: built TFDS sets, releases' folders, tables; in a fixed order.

Each row has an identity and a digest, so that a reply can be traced to what was shown and isn't mistaken
for the reply to something else. What is left out is counted with its reason.
"""

import dataclasses
import hashlib
import importlib
import io
import json
import pathlib

from data_prep import files, qa_files
from data_prep.build import BUILDERS
from data_prep.builders import figures as captioned
from data_prep.datasets.medpix2 import cases
from data_prep.datasets.roco import layout as roco_layout
from data_prep.files import DataError
from data_prep.ledger import Ledger
from paligemma_med.pp import json_text, tables
from paligemma_med.pp.files import default_data_dir

NAMES = ("medpix2", "rocov2", "roco_v1")  # alone, the caption config's train split
FIELDS = tuple(dict.fromkeys((*cases.FEATURES, *roco_layout.FEATURES)))
CAPTION = "caption"
_NOT_FIELDS = ("case_id", "concepts")  # FIELDS that a language model can't use
_COLUMNS = {
    "image_id": ("image_id", "id", "image", "name"),
    CAPTION: (CAPTION,),
    "case_id": ("case_id", "u_id", "case"),
    "split": ("split",),
}
_TABLES = (".jsonl", ".csv", ".tsv")
EXPECTED = (
    f"expected {', '.join(NAMES)}, tfds:NAME/CONFIG:SPLIT, release:NAME:FOLDER[:SPLIT], or a file "
    f"with image_id and caption that ends in {', '.join(_TABLES)}"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One image with the texts about it.

    fields: texts by name (caption, modality, plane, location, title, findings, diagnosis, topic,
    topic_discussion, …), only those with text. digest: of ids and fields, 64 hexadecimal digits.
    case_id: "" if the source has none. source: where it came from, without folders.
    """

    row_id: str
    image_id: str
    case_id: str
    split: str
    fields: dict[str, str]
    digest: str
    source: str


def new_books() -> Ledger:
    """The ledgers of `open_rows` and `units.plan`: rows read, and units made from them."""
    return Ledger(("rows", "units"), ("template",))


def open_rows(specs, books, *, data_dir=None, max_rows=None, id_column=None, caption_column=None) -> list[Row]:
    """The usable rows of all sources, in order, each image once.

    Args:
      specs: see EXPECTED; an image that occurs again in a later source is left out there.
      books: from `new_books`; counts each row.
      data_dir: where TFDS data sets are; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      max_rows: stop after this many.
      id_column, caption_column: a table's names for `image_id` and `caption`, if they differ.

    Returns:
      list of `Row`.

    Raises:
      DataError: a source doesn't exist or has another form; there is no usable row.
    """
    rows, seen = [], set()
    for spec in specs:
        for where, found in _open(spec, data_dir, id_column, caption_column):
            if len(rows) == max_rows:
                return rows
            books.read("rows")
            if isinstance(found, str):
                books.drop("rows", found, where)
                continue
            image_id, case_id, split, texts, source, reason = found
            fields = {k: _clean(v) for k, v in texts.items() if captioned.has_text(v)}
            reason = reason or cases.no_caption(fields.get(CAPTION, ""))
            if not image_id:
                reason = "no image id"
            elif not reason and image_id in seen:
                reason = "an image that came before"
            if reason:
                books.drop("rows", reason, image_id or where)
                continue
            seen.add(image_id)
            content = json.dumps([image_id, case_id, fields], sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()
            rows.append(Row(image_id, image_id, case_id, split, fields, digest, source))
            books.keep("rows", {"image_id": image_id})
    if not rows:
        report = books.to_report()["splits"]["rows"]
        why = ", ".join(f"{k}: {v['count']:,}" for k, v in report["dropped"].items())
        raise DataError(
            f"{', '.join(specs)}: none of {report['rows_read']:,} rows has a usable caption "
            f"({why or 'no rows'}); expected some"
        )
    return rows


def _clean(text):
    """The text without surrounding spaces and without what can't be written as UTF-8."""
    return text.encode("utf-8", "replace").decode().strip()


# --- Kinds of sources: each gives (where, why not) or (where, (image_id, case_id, split, texts,
# source, reason)) ---


def _open(spec, data_dir, id_column, caption_column):
    path = pathlib.Path(spec).expanduser()
    if spec in NAMES:
        return _tfds(f"tfds:{spec}/caption:train", data_dir)
    if spec.startswith("tfds:"):
        return _tfds(spec, data_dir)
    if spec.startswith("release:"):
        return _release(spec)
    if path.suffix.lower() in _TABLES:
        if not path.is_file():
            raise DataError(f"{path}: no such file; {EXPECTED}")
        return _table(path, id_column, caption_column)
    raise DataError(f"--input={spec}: not a kind of source; {EXPECTED}")


def _tfds(spec, data_dir):
    from paligemma_med import input_pipeline

    name, _, split = spec.removeprefix("tfds:").rpartition(":")
    if not name or not split:
        raise DataError(f"--input={spec}: expected tfds:NAME/CONFIG:SPLIT")
    source = input_pipeline.open_source(dict(name=name, split=split, data_dir=str(data_dir or default_data_dir())))
    if missing := [k for k in ("image_id", CAPTION) if k not in source.features]:
        raise DataError(
            f"--input={spec}: no feature {missing[0]} among {', '.join(source.features)}; expected "
            "a set of images with captions"
        )
    named = f"tfds:{name}:{source.about()['version']}:{split}"
    keys = [k for k in ("image_id", *FIELDS) if k in source.features]
    for number, row in enumerate(source.columns(keys), 1):
        texts = {k: row[k] for k in FIELDS if k in row and k not in _NOT_FIELDS}
        found = (row["image_id"], row.get("case_id", ""), split, texts, named, "")
        yield f"{spec} record {number}", found


def _release(spec):
    kind, _, rest = spec.removeprefix("release:").partition(":")
    if kind not in NAMES or not rest:
        raise DataError(f"--input={spec}: expected release:NAME:FOLDER[:SPLIT] with NAME one of {', '.join(NAMES)}")
    folder, _, split = rest.rpartition(":")
    if split not in captioned.SPLITS or not folder:
        folder, split = rest, None
    builder = importlib.import_module(BUILDERS[kind]).Builder
    figures = builder.read_release(pathlib.Path(folder).expanduser()).figures
    if split and not figures.get(split):
        raise DataError(f"--input={spec}: no split {split}; found {', '.join(s for s in figures if figures[s])}")
    for part in [split] if split else [s for s in captioned.SPLITS if s in figures]:
        for figure in figures[part].values():
            texts = {k: v for k, v in figure.features.items() if k not in _NOT_FIELDS}
            case = figure.features.get("case_id", "")
            named = f"release:{kind}:{part}"
            yield (
                f"{spec} {figure.image_id}",
                (figure.image_id, case, part, texts, named, figure.no_caption),
            )


def _table(path, id_column, caption_column):
    """JSONL, CSV or TSV with a header. Column names are looked up without regard to case."""
    wanted = dict(_COLUMNS)
    if id_column:
        wanted["image_id"] = (id_column.lower(),)
    if caption_column:
        wanted[CAPTION] = (caption_column.lower(),)
    lines = _jsonl(path) if path.suffix.lower() == ".jsonl" else _separated(path)
    names = None
    for where, cells in lines:
        if isinstance(cells, str):
            yield where, cells
            continue
        cells = {str(k).strip().lower(): v for k, v in cells.items()}
        # A table's columns are known by its first row; each object of JSONL has its own.
        if names is None or path.suffix.lower() == ".jsonl":
            found = {k: next((n for n in v if n in cells), None) for k, v in wanted.items()}
            if missing := [k for k in ("image_id", CAPTION) if found[k] is None]:
                if names is None:
                    what = "image_id" if missing[0] == "image_id" else CAPTION
                    flag = "--id_column" if what == "image_id" else "--caption_column"
                    raise DataError(
                        f"{where}: no column {' or '.join(wanted[what])} among "
                        f"{', '.join(cells) or 'none'}; {flag} names it"
                    )
                yield where, f"no {missing[0]}'s column"
                continue
            names = found
        text = {k: "" if cells.get(n) is None else cells[n] for k, n in names.items()}
        other = {k: cells[k] for k in FIELDS if k in cells and k not in (*_NOT_FIELDS, CAPTION)}
        odd = [
            k
            for k, v in {**text, **other}.items()
            if not isinstance(v, str | int | float | None) or isinstance(v, bool)
        ]
        if odd:
            yield where, f"{odd[0]} is no text"
            continue
        text = {k: str(v).strip() for k, v in text.items()}
        texts = {k: str(v) for k, v in other.items() if v is not None} | {CAPTION: text[CAPTION]}
        image_id = qa_files.image_id(text["image_id"])
        yield where, (image_id, text["case_id"], text["split"], texts, path.name, "")


def _lines(path, what):
    content = files.read_bytes(path, what)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path} line {line}: not UTF-8 text; expected {what}") from None


def _jsonl(path):
    for number, line in enumerate(_lines(path, "JSON lines").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json_text.parse(line, "a line", root=dict, constants=True, halves=True)
        except ValueError:
            row = "a line that is no JSON object"
        yield f"{path} line {number}", row


def _separated(path):
    text = io.StringIO(_lines(path, "a table with a header"), newline="")
    _, rows = tables.read(text, path, quotes=False, error=DataError)
    for line, row in rows:
        yield f"{path} line {line}", row
