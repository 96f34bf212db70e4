"""Made-up files in PMC-VQA's layout, for tests and benchmarks: no row or image is a real one."""

import csv
import io
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np
import PIL.Image

COLUMNS = {
    "v1": "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label",
    "v2": "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split",
}
_OPTIONS = ("CT", "MRI", "Ultrasound", "X-ray", "PET", "Angiography", "Mammography")


def write(
    folder: pathlib.Path,
    version: str = "v1",
    *,
    train: int = 60,
    test: int = 12,
    zipped: bool = True,
    pixels: int = 32,
    seed: int = 0,
) -> pathlib.Path:
    """Writes the tables and images of one release; three questions share two images of an article.

    Args:
      folder: created if missing.
      version: "v1" or "v2".
      train, test: rows.
      zipped: images in images.zip (v2: images_2.zip) below a folder, as released; else in folders.
      pixels: side of the images; 224 gives files of some 20 KB.
      seed: of all randomness.

    Returns:
      `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    bases = [_noise(rng, pixels) for _ in range(16)]
    stem, inside = ("images", "images") if version == "v1" else ("images_2", "figures")
    archive = zipfile.ZipFile(folder / f"{stem}.zip", "w") if zipped else None

    def save(name: str, content: bytes) -> None:
        if archive is not None:
            archive.writestr(f"{inside}/{name}", content)
        else:
            path = folder / inside / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    first = 1_000_000
    for split, n in (("train", train), ("test", test)):
        suffix = "" if version == "v1" else "_2"
        _table(folder / f"{split}{suffix}.csv", version, split, n, first, rng, bases, save)
        first += n
    if archive is not None:
        archive.close()
    return folder


def _table(
    path: pathlib.Path,
    version: str,
    split: str,
    n: int,
    first: int,
    rng: np.random.Generator,
    bases: list[bytes],
    save: Callable[[str, bytes], None],
) -> None:
    saved = ""
    with open(path, "w", encoding="utf-8", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(COLUMNS[version].split(","))
        for i in range(n):
            article, part = divmod(i, 3)
            name = f"PMC{first + article}_F{1 + part // 2}.jpg"
            if name != saved:
                save(name, _named(bases[i % len(bases)], name))
                saved = name
            options = [_OPTIONS[k] for k in rng.permutation(len(_OPTIONS))[:4]]
            right = int(rng.integers(4))
            question = f"Which modality, {i}, is shown?"
            if version == "v1":
                named = [f"{c}:{o} " for c, o in zip("ABCD", options)]
                row = [name, f" {question}", options[right], *named, "ABCD"[right]]
            else:
                named = [f" {c}: {o} " for c, o in zip("ABCD", options)]
                caption = f"A {options[right]} with a finding ( arrow ), {i}."
                row = [i, name, caption, f" {question} ", *named, "ABCD"[right], split]
            table.writerow(row)


def _noise(rng: np.random.Generator, pixels: int) -> bytes:
    out = io.BytesIO()
    image = rng.integers(0, 255, (pixels, pixels), np.uint8)
    PIL.Image.fromarray(image).convert("RGB").save(out, "JPEG", quality=60)
    return out.getvalue()


def _named(jpeg: bytes, name: str) -> bytes:
    """The same picture as another file: its name as a comment."""
    comment = name.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
