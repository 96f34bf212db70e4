"""Made-up files in the layouts of ROCOv2 and ROCO v1, for tests: no row or image is a real one."""

import csv
import io
import json
import pathlib
import zipfile

import numpy as np
import PIL.Image

SIZES = {"train": 8, "valid": 4, "test": 5}
_WHAT = ("CT of the chest", "plain film of a hand", "MRI of the brain", "ultrasound of the liver")
_CUIS = ("C0040405", "C1306645;C1140618;C1999039", "C0024485", "C0041618")


def ids(split: str, n: int, v2: bool = True) -> list[str]:
    """Ids of a split, with gaps as in the releases."""
    numbers = [1 + i + i // 3 for i in range(n)]
    if v2:
        return [f"ROCOv2_2023_{split}_{k:06d}" for k in numbers]
    first = list(SIZES).index(split)
    return [f"ROCO_{10 * k + first:05d}" for k in numbers]


def caption(split: str, i: int) -> str:
    """The caption of the i-th image of a split: some with commas, quotes, spaces, non-ASCII."""
    text = f"{_WHAT[i % 4]}, {split} finding {i}"
    return (text, f' {text} of 3\u2009mm "as is"', f"{text} (arrow)\xa0", text)[i % 4]


def image(key: str, pixels: int = 24) -> bytes:
    """A JPEG that differs from that of any other key; every other one is grey, as in ROCOv2."""
    rng = np.random.default_rng(list(key.encode()))
    shape = (pixels, pixels + 3) if key[-1] in "13579" else (pixels, pixels, 3)
    out = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write_v2(folder: pathlib.Path, *, zipped: bool = False, pixels: int = 24) -> pathlib.Path:
    """Captions, both kinds of concept files, and images per split in folders or zip files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in SIZES.items():
        names = ids(split, n)
        _table(
            folder / f"{split}_captions.csv",
            "Caption",
            [caption(split, i) for i in range(n)],
            names,
        )
        manual = [_CUIS[i % 4] if i % 5 != 4 else "" for i in range(n)]
        _table(folder / f"{split}_concepts_manual.csv", "CUIs", manual, names)
        both = [";".join(filter(None, (m, "C0856747"))) for m in manual]
        _table(folder / f"{split}_concepts.csv", "CUIs", both, names)
        files = {f"{name}.jpg": image(name, pixels) for name in names}
        if zipped:
            with zipfile.ZipFile(folder / f"{split}_images.zip", "w") as z:
                for name, content in files.items():
                    z.writestr(f"{split}/{name}", content)
        else:
            _save(folder / split, files)
    return folder


def write_v1(folder: pathlib.Path, *, medm: bool = False, pixels: int = 24) -> pathlib.Path:
    """The layout of the data set's repository after its script, or MedM's captions."""
    for split, n in SIZES.items():
        names = ids(split, n, v2=False)
        lines = "".join(f"{k}\t {caption(split, i)}\n" for i, k in enumerate(names))
        files = {f"{k}.jpg": image(k, pixels) for k in names}
        if medm:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}_captions.txt").write_text(lines, encoding="utf-8")
            _save(folder / "images", files)
            continue
        name = "validation" if split == "valid" else split
        at = folder / "data" / name / "radiology"
        at.mkdir(parents=True, exist_ok=True)
        (at / "captions.txt").write_text(lines, encoding="utf-8")
        (at / "cuis.txt").write_text("".join(f"{k}\t\tC0040405\tC0817096\n" for k in names))
        link = "{0}\twget -r ftp://host/pub/{1}.tar.gz -P /path\tfig-{0}.jpg\n"
        part = list(SIZES).index(split)
        papers = {k: f"PMC{400 + i}{part}" for i, k in enumerate(names)}
        (at / "dlinks.txt").write_text("".join(link.format(k, papers[k]) for k in names))
        _save(at / "images", {f"{papers[k]}_fig-{k}.jpg": files[f"{k}.jpg"] for k in names})
    return folder


def write_qa(path: pathlib.Path, v2: bool = True) -> pathlib.Path:
    """Two question-answer pairs per image, in our JSON Lines."""
    with open(path, "w", encoding="utf-8") as f:
        for split, n in SIZES.items():
            for i, name in enumerate(ids(split, n, v2)):
                for question, answer in (
                    (f"What is {i}?", caption(split, i)),
                    ("Is it normal?", "No"),
                ):
                    row = {"image_id": name, "question": question, "answer": answer}
                    f.write(json.dumps(row) + "\n")
    return path


def _table(path: pathlib.Path, column: str, values: list[str], names: list[str]) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows([("ID", column), *zip(names, values)])
    path.write_text(out.getvalue().removesuffix("\n"), encoding="utf-8", newline="")


def _save(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
