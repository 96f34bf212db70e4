"""Where captions come from: built TFDS sets, releases' folders, tables; in a fixed order."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One image with what is written about it.

    fields: texts by name (caption, modality, plane, location, title, findings, diagnosis, topic,
    topic_discussion, …), only those with text. digest: of all the rest, 64 hexadecimal digits.
    case_id: "" where the source has none. source: the spec it came from, without folders.
    """

    row_id: str
    image_id: str
    case_id: str
    split: str
    fields: dict[str, str]
    digest: str
    source: str


def open_rows(specs, *, data_dir=None, max_rows=None, id_column=None, caption_column=None):
    """(rows, books): the usable rows of all sources in order, and what became of the others."""
    raise NotImplementedError
