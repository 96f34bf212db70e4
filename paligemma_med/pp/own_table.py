"""One's own table of questions: a CSV, TSV, JSON lines, Parquet or Excel file beside a folder of images, row by row.

What is wrong with a row costs that row alone, which is counted and listed with its line and the reason; what evaluators
need and the table lacks is made up, and said. Rows stay in their file and are read when they are asked for: some 50
bytes a row are held, however large the images are.
"""

import array
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from paligemma_med.pp import files, image_cells, own_rows, rows, table_forms, tables

_FIRST = 5  # lines that are named for each reason


class Part(NamedTuple):
    """A file of a table, or Parquet files that are one; images: where those begin that it names; split: of all rows."""

    path: str | list[str]
    images: str
    split: str = ""


def open_table(
    path: os.PathLike | str,
    *,
    images: os.PathLike | str | None = None,
    columns: str | Mapping[str, str] | None = None,
    needs: Sequence[str] = ("image", "question"),
    missing_images: bool = False,
    choose: str | None = None,
) -> "OwnTable":
    """A table that is ready to be read.

    Args:
      path: a .csv, .tsv, .txt, .jsonl, .ndjson, .parquet or .xlsx file.
      images: the folder that the images' names begin in; by default the table's own.
      columns: names that the file has for others: "image=file,question=frage", or a dict.
      needs: columns that each row must fill.
      missing_images: takes rows whose image isn't there, too; `image_bytes` then says why.
      choose: what is shown of folders of slices and of files of several frames where a cell doesn't say it:
        "slice=middle", "montage=2x4|frame=middle|window=brain", see `image_cells`.

    Raises:
      ValueError: no such table, a column that it lacks, or not a single row that can be used.
      OSError: can't be read.
    """
    path = os.fspath(path)
    if not path.lower().endswith(table_forms.SUFFIXES):
        raise ValueError(f"{path}: expected a table that ends in {', '.join(table_forms.SUFFIXES)}.")
    folder = os.fspath(images) if images else os.path.dirname(path) or "."
    folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
        raise ValueError(
            f"images={folder}: no such folder; expected the one that the names of images in {path} begin in."
        )
    kw = dict(columns=columns, needs=needs, missing_images=missing_images, choose=choose)
    return OwnTable(path, [Part(path, folder)], **kw)


class OwnTable:
    """Rows by number: `len(table)`, `table[i]`. Picklable; threads may share it. Made by `open_table`.

    name: the file. columns: keys of every row. made: those that the table lacks.
    own: {our name: its name there} of the columns that it has, in its order. delimiter: between its cells, or a comma.
    dropped: [(line, reason)] of rows that can't be used. read: rows with those. notes: sentences for the user.
    splits: names of the splits that the table gives, in the order in which they appear; none if it gives none.
    split_codes: int16[rows], number of a row's split among them, -1 where it gives none.
    image_keys, patient_keys: uint64[rows], equal for rows of one image or patient; 0: no patient is given. All slices
      of a series, and frames of a file, are one image here.
    image_sizes: int64[rows], bytes of an image's files; 0 for one in the table, whose key is that of its content.
    digest: 16 hexadecimal digits of all texts, and of images in the table. bytes: of its files.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        *,
        columns: str | Mapping[str, str] | None = None,
        needs: Sequence[str] = ("image", "question"),
        missing_images: bool = False,
        choose: str | None = None,
    ):
        """Goes once through the files. Arguments and errors as of `open_table`."""
        self.name, self.needs, self.missing_images = name, tuple(needs), missing_images
        self._names = own_rows.names_of(columns)
        self._choose = image_cells.parse_default(choose)
        self.dropped: list[tuple[int | str, str]] = []
        self.notes: list[str] = []
        self._folders = [part.images for part in parts]
        several = len(set(self._folders)) > 1  # images of two folders may have one name
        self._prefixes = [f"{os.path.basename(x)}/" if several else "" for x in self._folders]
        self._labels = [part.path if isinstance(part.path, str) else part.path[0] for part in parts]
        self._splits_of_parts = [own_rows.split_name(part.split) for part in parts]
        self._forms = [self._open(part) for part in parts]
        keys = {key for form in self._forms for key in self._shape_names(form.columns)} if self._all_known() else set()
        if self._all_known():
            self._check_columns(keys)
        _Scan(self, keys).run()
        paths = [p for part in parts for p in ([part.path] if isinstance(part.path, str) else part.path)]
        self.bytes = sum(os.path.getsize(p) for p in paths)
        digest = hashlib.sha256()
        for form, split in zip(self._forms, self._splits_of_parts):
            with open(form.path, "rb") as f:
                digest.update(f"{split}\0{hashlib.file_digest(f, 'sha256').hexdigest()}\0".encode())
        self.digest = digest.hexdigest()[:16]

    def _all_known(self):
        return all(form.columns is not None for form in self._forms)

    def _open(self, part):
        path = part.path
        if not isinstance(path, str):
            return table_forms.parquet(path, self._theirs("image"))
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such file; expected a table.")
        if path.lower().endswith(".parquet"):
            return table_forms.parquet([path], self._theirs("image"))
        if path.lower().endswith(".xlsx"):
            form, notes = table_forms.xlsx(path)
            self.notes += [f"{path}: {note}." for note in notes]
            return form
        form = (table_forms.JsonLines if path.lower().endswith((".jsonl", ".ndjson")) else table_forms.Csv)(path)
        if form.encoding != "utf-8":
            self.notes.append(f"{path} is read as {tables.ENCODINGS[form.encoding]}.")
        return form

    def _theirs(self, ours):
        return next((theirs for theirs, name in self._names.items() if name == ours), ours)

    def _check_columns(self, keys):
        theirs = {name for form in self._forms for name in form.columns}
        shown = ", ".join(sorted(filter(None, theirs))) or "none"
        if missing := [t for t in self._names if t not in theirs]:
            raise ValueError(f"{self.name}: no column {missing[0]!r}, which columns= names; found {shown}.")
        if missing := [key for key in self.needs if key not in keys]:
            raise ValueError(
                f"{self.name}: no column {' and no column '.join(missing)}; found {shown}. If it has another "
                f"name, say so: columns='{missing[0]}=NAME'."
            )

    # --- Rows ---

    def __len__(self) -> int:
        return len(self._begin)

    def __str__(self) -> str:
        return f"table {self.name}"

    __repr__ = __str__

    def __getitem__(self, index: int) -> dict[str, str]:
        """The texts of a row: `columns`, "image" among them, the name of its file or "" for one in the table."""
        row, _ = self._row(self._index(index))
        return row

    def _index(self, index):
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return index % len(self)

    @property
    def delimiter(self) -> str:
        return self._forms[0].delimiter or ","

    def line(self, index: int) -> int | str:
        """Where a row stands: its line, or its row in Excel and Parquet; of several files with the file's name."""
        index = self._index(index)
        return self._place(int(self._part[index]), int(self._line[index]))

    def _place(self, part, line):
        return f"{os.path.basename(self._labels[part])} {line}" if len(self._labels) > 1 else line

    def image_path(self, index: int) -> pathlib.Path | None:
        """The file of a row's image, the first of several, or folder; None if it is in the table, or there is none."""
        index = self._index(index)
        row, entry = self._row(index)
        if entry is not None or not row["image"]:
            return None
        return image_cells.parse(row["image"], self._folders[self._part[index]])[0].path

    def image_digest(self, index: int) -> bytes:
        """Equal for rows whose images are made of equal files. ValueError and OSError: there are none."""
        index = self._index(index)
        return image_cells.digest(self[index]["image"], self._folders[self._part[index]])

    def image_bytes(self, index: int) -> bytes:
        """A row's image: a file as it is stored, or a picture made of several, as `image_cells` has it.

        ValueError: there is none, or it can't be read.
        """
        index = self._index(index)
        row, entry = self._row(index)
        if entry is not None:
            return self._forms[self._part[index]].image(entry)
        if not row["image"]:
            raise ValueError(f"{self.name} line {self.line(index)}: has no image.")
        folder = self._folders[self._part[index]]
        try:
            return image_cells.load(row["image"], folder, choose=self._choose)
        except image_cells.OutsideError as e:
            raise ValueError(f"{self.name} line {self.line(index)}: {e}") from None
        except (OSError, ValueError) as e:
            why = f"{self.image_path(index)}: {e.strerror}." if isinstance(e, OSError) else e
            raise ValueError(f"{self.name} line {self.line(index)}: image {why}") from None

    def _row(self, index):
        """(texts, entry of an image in the table or None) of a row that was found good."""
        part = int(self._part[index])
        try:
            record = self._forms[part].at(int(self._begin[index]), int(self._size[index]))
            row, entry = self._shaped(record)
            row = own_rows.completed(row, entry, int(self._number[index]), self._prefixes[part])
        except (ValueError, KeyError, StopIteration, OSError) as e:
            where = f"{self.name} line {self.line(index)}"
            raise ValueError(
                f"{where}: can't be read again ({files.reason(e)}); the table was changed meanwhile."
            ) from None
        if self._splits_of_parts[part]:
            row["split"] = self._splits_of_parts[part]
        return {key: row.get(key, "") for key in self.columns}, entry

    def texts(self, keys: Iterable[str]) -> Iterator[dict[str, str]]:
        """Each row with these keys alone, in order."""
        keys = tuple(keys)
        for i in range(len(self)):
            row = self[i]
            yield {key: row[key] for key in keys}

    @functools.lru_cache(maxsize=64)  # noqa: B019  (a table lives as long as its program)
    def _name(self, theirs):
        ours = self._names.get(theirs)
        if ours is None:
            ours = own_rows.known(theirs)
            if ours in self._names.values():  # another column was named to be this
                return ""
        return ours

    def _shape_names(self, names):
        return {self._name(n) for n in names} - {"", table_forms.IMAGE}

    def _shaped(self, record):
        """({our name: text}, entry of an image in the table or None)."""
        entry = record.get(table_forms.IMAGE)
        row = {self._name(k): v for k, v in record.items() if k != table_forms.IMAGE}
        row.pop("", None)
        if "choices" in row:
            row = {**row, **own_rows.split_choices(row["choices"])}
            del row["choices"]
        row = {k: table_forms.as_text(v).strip() for k, v in row.items()}
        return row, entry

    def __getstate__(self):
        return self.__dict__

    # --- What is said ---

    def summary(self) -> list[str]:
        """What of the rows can't be used, and what was made up: sentences for a log or a terminal."""
        out = list(self.notes)
        if self.dropped:
            out.append(f"{self.name}: {len(self.dropped):,} of {self.read:,} rows can't be used:")
            kinds: dict[str, list] = {}
            for line, reason in self.dropped:
                kinds.setdefault(reason.partition(": ")[0], []).append((line, reason))
            for kind, found in kinds.items():
                more = ", …" if len(found) > _FIRST else ""
                first = ", ".join(str(line) for line, _ in found[:_FIRST])
                detail = found[0][1].partition(": ")[2]
                for_example = f"; first: {detail}" if detail else ""
                out.append(f"  {kind}: {len(found):,} (line {first}{more}{for_example})")
        return out


class _Scan:
    """The one pass through a table's files, which fills its arrays."""

    TYPES = dict(_begin="q", _size="I", _line="I", _number="I", _part="H", split_codes="h")
    TYPES |= dict(image_keys="Q", image_sizes="q", patient_keys="Q", ids="Q")

    def __init__(self, table, keys):
        self.table, self.keys = table, set(keys)
        self.arrays = {name: array.array(code) for name, code in self.TYPES.items()}
        self.splits: dict[str, int] = {}
        self.given = set()  # columns with a text in some row
        self.own: dict[str, str] = {}
        self.first_file = ""

    def run(self):
        table, number = self.table, 0
        for part, form in enumerate(table._forms):
            self.look_at = functools.lru_cache(1024)(
                functools.partial(image_cells.look_at, folder=table._folders[part])
            )
            for line, begin, size, record in form.scan():
                number += 1
                try:
                    if isinstance(record, str):
                        raise ValueError(record)
                    self._take(part, line, begin, size, record, number)
                except ValueError as e:
                    table.dropped.append((table._place(part, line), files.one_line(str(e))))
        table.read = number
        self._finish()

    def _take(self, part, line, begin, size, record, number):
        table = self.table
        row, entry = table._shaped(record)
        self.keys.update(row)
        if not row.keys() <= self.own.keys():
            names = {table._name(theirs): theirs for theirs in record}
            self.own |= {ours: names.get(ours, ours) for ours in row if ours not in self.own}
        filled = [k for k in table.needs if k not in ("image", "question_id", "image_id", "answer_type")]
        if wrong := [k for k in filled if own_rows.is_blank(row.get(k, ""))]:
            raise ValueError(f"empty {wrong[0]}" if wrong[0] in row else f"no {wrong[0]}")
        bytes_, sources = (0, ()) if entry is not None else self._files(row, record)
        image_id = row.get("image_id")
        self.given.update(k for k, v in row.items() if v)
        row = own_rows.completed(row, entry, number, table._prefixes[part])
        split = table._splits_of_parts[part] or own_rows.split_name(row.get("split", ""))
        code = self.splits.setdefault(split, len(self.splits)) if split else -1
        patient = row.get("patient_id", "")
        keys = (
            own_rows.image_key(row["image_id"] if image_id else sources or row["image_id"], table._prefixes[part]),
            bytes_,
            own_rows.key_of(patient) if patient else 0,
            own_rows.key_of(split, row["question_id"]),
        )
        values = (begin, size, line, number, part, code, *keys)
        for name, value in zip(self.TYPES, values):
            self.arrays[name].append(value)

    def _files(self, row, record):
        """(bytes, names) of the files of a row's image. ValueError: there are none."""
        try:
            if table_forms.IMAGE in record:
                raise ValueError("an empty image")
            if name := row.get("image", ""):
                return self.look_at(name)
            if "image" in self.table.needs:
                raise ValueError("names no image" if "image" in row else "no image")
        except ValueError:
            if not self.table.missing_images:
                raise
        return 0, ()

    def _finish(self):
        table = self.table
        arrays = {name: np.frombuffer(values, values.typecode) for name, values in self.arrays.items()}
        ids = arrays.pop("ids")
        _, first = np.unique(ids, return_index=True)
        if len(first) < len(ids):
            keep = np.zeros(len(ids), bool)
            keep[first] = True
            for i in np.flatnonzero(~keep):
                where = table._place(int(arrays["_part"][i]), int(arrays["_line"][i]))
                table.dropped.append((where, "its question_id stands in an earlier row"))
            arrays = {name: values[keep] for name, values in arrays.items()}
        for name, values in arrays.items():
            setattr(table, name, values.copy())
        table.splits = tuple(self.splits)
        if not len(table):
            self._refuse()
        made = [k for k in rows.KEYS if k not in self.keys and k not in ("question", "answer")]
        table.made = tuple(made)
        keys = self.keys - {"choices"} | {*rows.KEYS, "image"}
        if any(own_rows.CHOICE.fullmatch(k) for k in keys):
            keys.add(rows.ANSWER_LETTER)
        if any(table._splits_of_parts):
            keys.add("split")
        table.columns = tuple(sorted(keys - {""}))
        table.own = {ours: theirs for ours, theirs in self.own.items() if ours in keys}
        table.notes += self._notes(made)

    def _refuse(self):
        table = self.table
        if not table.read:
            raise ValueError(f"{table.name} has no rows; expected a question in each line after the header.")
        line, reason = table.dropped[0]
        found = "" if table._all_known() else f"; found the keys {', '.join(sorted(self.keys)) or 'none'}"
        raise ValueError(
            f"{table.name}: none of its {table.read:,} rows can be used; the first, line {line}: {reason}{found}. "
            f"Images are looked for in {table._folders[0]}."
        )

    def _notes(self, made):
        words = {
            "question_id": "question_id is made of the rows' numbers (row1, row2, …)",
            "image_id": "image_id is the name of the image's file, or the digest of one in the table",
            "answer_type": "answer_type is CLOSED for yes, no and questions with choices, OPEN for others",
        }
        if "answer" not in self.given:
            made = [k for k in made if k != "answer_type"]
        if made:
            yield f"{self.table.name}: made up, as the table lacks it: {'; '.join(words[k] for k in made)}."
        without = int((self.table.split_codes < 0).sum())
        if self.splits and without:
            yield f"{self.table.name}: {without:,} rows name no split; they are in 'all' alone."
