"""The files that an own table comes in: CSV, JSON lines, Parquet, Excel; gone through once, then read row by row.

After the one pass only the place of each row is kept: where it begins in the file, and how long it is. What has no such
places, Excel and Parquet, is written to a temporary file of JSON lines on the way. Parquet's images stay where they are
if their row groups are small, as Hugging Face writes them; else they are copied beside those lines.
"""

import collections
import datetime
import hashlib
import importlib
import json
import math
import os
import pathlib
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from paligemma_med.pp import files, json_text, tables

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet", ".xlsx")
# A row group whose images take more than this would be read whole for each of them.
_GROUP = 16 * 2**20
_XLSX = 2 * 2**30  # bytes that a workbook may unpack to
# What stands in a JSON line for an image in the table: [digest, ["group", file, row group, row]] or [digest, ["bytes",
# from, length]]; null if it is empty.
IMAGE = "\0image"
# (line, where its text begins, bytes of it, the record or why there is none)
Found = Iterator[tuple[int, int, int, dict[str, Any] | str]]


def package(name: str, path: Any, extra: str) -> Any:
    """A module that reads one kind of file; ValueError, with what to install, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        top = name.partition(".")[0]
        raise ValueError(
            f"{path}: {top}, which reads such files, is not installed: pip install 'paligemma_med[{extra}]', or save "
            "the table as CSV or JSON lines."
        ) from None


class _Text:
    """A text file of which pieces are read by their place. Picklable; threads may share it."""

    def __init__(self, path: os.PathLike | str):
        self.path = os.fspath(path)
        self._file = open(self.path, "rb", buffering=0)

    def piece(self, begin: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, begin)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_file"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._file = open(self.path, "rb", buffering=0)


class Csv(_Text):
    """Cells with a character between them; the first line names them.

    columns: names as the file has them. encoding: a key of `tables.ENCODINGS`. delimiter: the character.
    """

    def __init__(self, path: os.PathLike | str):
        super().__init__(path)
        self.encoding, self._start = tables.encoding_of(path)
        lines = self._lines()
        found = tables.layout(lines, path)
        self.columns, self.delimiter = found.columns, found.delimiter

    def _lines(self):
        return _Counted(self.path, self.encoding, self._start)

    def scan(self) -> Found:
        lines = self._lines()
        found = tables.layout(lines, self.path)
        begin = lines.offset
        try:
            for line, record in found.rows:
                yield line, begin, lines.offset - begin, record
                begin = lines.offset
        finally:
            lines.close()

    def at(self, begin: int, size: int) -> dict[str, str]:
        return tables.row(self.piece(begin, size).decode(self.encoding), self.columns, self.delimiter)


class _Counted:
    """The lines of a text file; offset: bytes of those that were given."""

    def __init__(self, path, encoding, start):
        self.offset, self._path, self._encoding, self._number = start, path, encoding, 0
        self._file = open(path, encoding=encoding, newline="")
        self._file.seek(start)
        self._ascii = 2 if encoding.startswith("utf-16") else 1

    def __iter__(self):
        return self

    def __next__(self):
        try:
            line = next(self._file)
        except UnicodeDecodeError as e:
            name = tables.ENCODINGS[self._encoding]
            raise ValueError(
                f"{self._path} after line {self._number}: not {name} ({e.reason}); save the file as UTF-8."
            ) from None
        self._number += 1
        self.offset += len(line) * self._ascii if line.isascii() else len(line.encode(self._encoding))
        return line

    def close(self):
        self._file.close()


class JsonLines(_Text):
    """An object a line. columns: None, since only all lines together tell them."""

    columns = None
    delimiter = ""

    def __init__(self, path: os.PathLike | str):
        super().__init__(path)
        self.encoding, self._start = tables.encoding_of(path)

    def scan(self) -> Found:
        lines, begin = _Counted(self.path, self.encoding, self._start), self._start
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, begin, lines.offset - begin, self._parsed(line, number)
                begin = lines.offset
        finally:
            lines.close()

    def _parsed(self, line, number):
        try:
            return json_text.parse(line, f"line {number}", "an object", root=dict)
        except ValueError as e:
            return f"no JSON object: {files.one_line(str(e))}"

    def at(self, begin: int, size: int) -> dict[str, Any]:
        return json_text.parse(self.piece(begin, size).decode(self.encoding), self.path, "an object", root=dict)


class Spooled(_Text):
    """Rows of a file without places of rows, as JSON lines in a temporary file that is gone when this is.

    Args:
      source: the file, for messages.
      columns: its names.
      records: a function of `keep` that yields (line, record) or (line, why there is none); `keep(content)` gives the
        IMAGE entry of an image whose bytes were copied.
      groups: reads images that stayed in their file.
    """

    encoding, delimiter = "utf-8", ""

    def __init__(self, source: os.PathLike | str, columns: list[str], records: Callable, groups: Any = None):
        handle, path = tempfile.mkstemp(prefix="paligemma_med_table_", suffix=".jsonl")
        os.close(handle)
        super().__init__(path)
        weakref.finalize(self, _remove, path, os.getpid())
        self.source, self.columns, self._records, self._groups = os.fspath(source), columns, records, groups

    def scan(self) -> Found:
        with open(self.path, "wb") as f:

            def keep(content):
                begin = f.tell()
                f.write(content)
                return ["bytes", begin, len(content)]

            for line, record in self._records(keep):
                if isinstance(record, str):
                    yield line, 0, 0, record
                    continue
                text = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
                begin = f.tell()
                f.write(text)
                yield line, begin, len(text), record
        self._records = None

    def at(self, begin: int, size: int) -> dict[str, Any]:
        return json_text.parse(self.piece(begin, size), self.source, "an object", root=dict, halves=True)

    def image(self, entry: list) -> bytes:
        """The bytes that an IMAGE entry stands for."""
        kind, *place = entry[1]
        return self.piece(*place) if kind == "bytes" else self._groups.image(*place)


def _remove(path, process):
    if os.getpid() == process:  # a copy in a forked worker owns nothing
        pathlib.Path(path).unlink(missing_ok=True)


# --- Excel ---


def xlsx(path: os.PathLike | str, formulas: bool = False) -> tuple[Spooled, list[str]]:
    """(the first sheet of a workbook, what is to be said about it). Values of formulas are those last saved; with
    `formulas` such cells are the formula's text, which a program may have written without meaning one.

    Raises:
      ValueError: not a workbook, one that would unpack to more than 2 GiB, an empty sheet, a column twice.
    """
    openpyxl = package("openpyxl", path, "tables")
    with open(path, "rb"):
        pass  # what can't be opened is told by the system; of a damaged one zipfile raises OSError, too
    try:
        with zipfile.ZipFile(path) as z:
            size = sum(x.file_size for x in z.infolist())
        if size > _XLSX:
            raise ValueError(f"{path}: would unpack to {size:,} bytes; expected at most {_XLSX:,}.")
        book = openpyxl.load_workbook(path, read_only=True, data_only=not formulas)
        names, sheet = book.sheetnames, book.worksheets[0]
        sheet.reset_dimensions()
        rows = ((i, cells) for i, cells in enumerate(sheet.iter_rows(values_only=True), 1) if any(map(_filled, cells)))
        number, header = next(rows, (1, ()))
    except ValueError as e:
        raise ValueError(f"{path}: {files.reason(e)}" if str(path) not in str(e) else str(e)) from None
    except MemoryError:
        raise
    except Exception as e:  # of zipfile, XML and openpyxl, depending on what is wrong
        raise ValueError(f"{path}: no .xlsx workbook that openpyxl can read ({files.reason(e)}).") from None
    header = [as_text(c).strip() for c in header]
    small = [c.lower() for c in header if c]
    if again := [c for c in small if small.count(c) > 1]:
        raise ValueError(f"{path} row {number}: the column {again[0]} stands there twice; expected once.")

    def records(keep):
        del keep
        try:
            for line, cells in rows:
                cells = [as_text(getattr(c, "text", c)) for c in cells]  # of an array formula, its text
                if any(cells[len(header) :]):
                    yield line, tables.OTHER_WIDTH
                else:  # Excel leaves out empty cells at the end
                    yield line, dict(zip(header, cells + [""] * (len(header) - len(cells))))
        except Exception as e:
            raise ValueError(f"{path}: a damaged workbook ({files.reason(e)}).") from None
        finally:
            book.close()

    note = f"the sheet {names[0]!r} is read, the first of {len(names)}" if len(names) > 1 else ""
    return Spooled(path, header, records), [note] if note else []


def _filled(value):
    return value is not None and str(value).strip() != ""


def as_text(value: Any) -> str:
    """A cell's or a JSON value as text: whole numbers without a fraction, dates as ISO has them, null as nothing."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):  # how pandas writes an empty cell
            return ""
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


# --- Parquet ---


def parquet(paths: list[os.PathLike | str], image: str) -> Spooled:
    """The rows of Parquet files that belong together; `image`: the column that may hold images as bytes.

    Raises:
      ValueError: not Parquet, or its columns differ from the first file's.
    """
    pq = package("pyarrow.parquet", paths[0], "tables")
    columns = None
    for path in paths:
        names = _opened(pq, path).schema_arrow.names
        columns = names if columns is None else columns
        if sorted(names) != sorted(columns):
            raise ValueError(
                f"{path}: has the columns {', '.join(names)}; expected {', '.join(columns)} as {paths[0]} has."
            )
    groups = _Groups([os.fspath(p) for p in paths], image)
    return Spooled(paths[0], list(columns), lambda keep: _parquet_records(pq, paths, image, keep), groups)


def _opened(pq, path):
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except OSError as e:
        if e.errno:
            raise
        raise ValueError(f"{path}: no Parquet file ({files.reason(e)}).") from None
    except Exception as e:
        raise ValueError(f"{path}: no Parquet file ({files.reason(e)}).") from None


def _parquet_records(pq, paths, image, keep):
    for number, path in enumerate(paths):
        file, line = _opened(pq, path), 0
        for group in range(file.metadata.num_row_groups):
            try:
                size, place = _image_bytes(file.metadata.row_group(group), image), 0
                for batch in file.iter_batches(64 if size else 1024, row_groups=[group], use_threads=False):
                    for record in batch.to_pylist():
                        line += 1
                        yield line, _stored(record, image, keep if size > _GROUP else ["group", number, group, place])
                        place += 1
            except (ValueError, OSError, ArithmeticError) as e:
                raise ValueError(f"{path} after row {line}: damaged ({files.reason(e)}).") from None


def _image_bytes(group, image):
    columns = [group.column(j) for j in range(group.num_columns)]
    inside = [c for c in columns if c.path_in_schema == image or c.path_in_schema.startswith(f"{image}.")]
    return sum(c.total_uncompressed_size for c in inside if c.physical_type == "BYTE_ARRAY")


def _stored(record, image, where):
    """A record as JSON can hold it, bytes of an image replaced by their place and digest; or why it is none."""
    value = record.get(image)
    if isinstance(value, list):
        if len(value) > 1:
            return f"{len(value)} images; expected one"
        value = value[0] if value else None
    content, name = value, None
    if isinstance(value, dict) and {"bytes", "path"} >= value.keys():
        content, name = value.get("bytes"), value.get("path")
    if isinstance(content, bytes):
        digest = hashlib.sha256(content).hexdigest()[:16]
        entry = where(content) if callable(where) else where
        record = record | {image: name or "", IMAGE: [digest, entry] if content else None}
    elif isinstance(value, dict):
        record = record | {image: name or ""}
    out = {}
    for key, x in record.items():
        if isinstance(x, bytes):
            return f"bytes in the column {key}; expected a text"
        out[key] = x if isinstance(x, str | list | dict) or key == IMAGE else as_text(x)
    try:
        json.dumps(out)
    except (TypeError, ValueError):
        return "a value that is no text, number or list"
    return out


class _Groups:
    """Images in Parquet files, by row group; the last few groups are held. Picklable; threads may share it."""

    HELD = 3

    def __init__(self, paths, image):
        self._paths, self._image = paths, image
        self._start()

    def _start(self):
        self._lock, self._held = threading.Lock(), collections.OrderedDict()

    def __getstate__(self):
        return self._paths, self._image

    def __setstate__(self, state):
        self._paths, self._image = state
        self._start()

    def image(self, file: int, group: int, row: int) -> bytes:
        import pyarrow.parquet as pq

        with self._lock:  # also: a Parquet file is no thing for two threads
            if (column := self._held.pop((file, group), None)) is None:
                opened = pq.ParquetFile(self._paths[file], pre_buffer=False)
                table = opened.read_row_group(group, columns=[self._image], use_threads=False)
                column = table.column(self._image)
            self._held[file, group] = column
            while len(self._held) > self.HELD:
                self._held.popitem(last=False)
        value = column[row].as_py()
        value = value[0] if isinstance(value, list) else value
        return value["bytes"] if isinstance(value, dict) else value
