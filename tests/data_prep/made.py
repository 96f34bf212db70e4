"""What tests of builders share: small images, and the records of a built set."""

import io
import json

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from data_prep.build import build
from data_prep.builders import questioned, row_file


def image(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image that differs from that of any other seed."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
    PIL.Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def write(path, content: bytes | str) -> None:
    """Writes a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(folder, split: str) -> dict[str, dict]:
    """{question_id: features as texts, image as bytes} of a built split."""
    source = tfds.builder_from_directory(folder).as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    rows = ({k: v if k == "image" else v.decode() for k, v in x.items()} for x in source)
    return {x["question_id"]: x for x in rows}


def built(name: str, folder, data_dir, config: str | None = None, **options) -> tuple[dict, dict]:
    """(build report, {split: its rows}) of one config."""
    made = build(name, manual_dir=folder, data_dir=data_dir, config=config, options=options)
    (place,) = made.values()
    report = json.loads((place / "build_report.json").read_text())
    splits = [split for split, book in report["splits"].items() if book["rows_kept"]]
    return report, {split: read(place, split) for split in splits}


def checked(found: questioned.Questions, folder, work_dir, **kw) -> tuple[dict, dict]:
    """As `built`, of what a reader found, without writing records: {question_id: features} of all splits in one."""
    rows, report = questioned.make_rows(found, folder, work_dir=work_dir, **kw)
    texts = [row["features"] for writer in rows.values() for row in row_file.read_rows(writer.path)]
    return report, {x["question_id"]: x for x in texts}
