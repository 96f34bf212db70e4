"""A small folder in SLAKE's layout, made afresh for each test that wants one."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest


class SlakeFolder:
    """Writes SLAKE-like files; a test changes `rows` or files before it calls `write`."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.rows = {"train": [], "validate": [], "test": []}
        qid = 0
        # As in the release: within a language the splits' images are disjoint, over both they
        # are not (image 4 is in English test and Chinese train).
        images = {
            "en": {"train": (0, 1), "validate": (2,), "test": (3, 4)},
            "zh": {"train": (3, 4), "validate": (2,), "test": (0, 1)},
        }
        for split in self.rows:
            for lang in ("en", "zh"):
                for image in images[lang][split]:
                    for closed in (False, True):
                        self.rows[split].append(self.row(qid, image, lang, closed))
                        qid += 1

    @staticmethod
    def row(qid: int, image: int, lang: str = "en", closed: bool = False) -> dict:
        texts = {
            ("en", False): ("What modality is used?", "CT"),
            ("en", True): ("Does it contain lung?", "Yes"),
            ("zh", False): ("这张图片的成像方式是什么?", "CT"),
            ("zh", True): ("图像里包含肺吗?", "包含"),
        }
        question, answer = texts[lang, closed]
        row = {
            "img_id": image,
            "img_name": f"xmlab{image}/source.jpg",
            "question": question,
            "answer": answer,
            "q_lang": lang,
            "location": "Lung",
            "modality": "CT",
            "answer_type": "CLOSED" if closed else "OPEN",
            "base_type": "vqa",
            "content_type": "Modality",
            "triple": ["vhead", "_", "_"],
            "qid": qid,
        }
        # The release's key order varies.
        return row if qid % 3 else dict(reversed(row.items()))

    def image(self, i: int) -> pathlib.Path:
        return self.root / "imgs" / f"xmlab{i}" / "source.jpg"

    def write(self, *, validate_name: str = "validate.json") -> pathlib.Path:
        rng = np.random.default_rng(0)
        for i in range(5):
            self.image(i).parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40, 40 + i, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(self.image(i), quality=88)
            boxes = [] if i == 2 else [{"Liver": [1.0, 2, 3.5, 4]}, {"Lung": [5, 6, 7, 8]}]
            (self.image(i).parent / "detection.json").write_text(json.dumps(boxes))
        (self.root / "imgs" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (self.root / "imgs" / "__MACOSX").mkdir(exist_ok=True)
        (self.root / "imgs" / "__MACOSX" / "._source.jpg").write_bytes(b"\0\5\x16\7")
        self.write_rows(validate_name=validate_name)
        return self.root

    def write_rows(self, *, validate_name: str = "validate.json") -> None:
        for split, rows in self.rows.items():
            name = validate_name if split == "validate" else f"{split}.json"
            text = json.dumps(rows, ensure_ascii=False)
            (self.root / name).write_text(text, encoding="utf-8")


@pytest.fixture
def slake(tmp_path):
    root = tmp_path / "slake"
    root.mkdir()
    return SlakeFolder(root)
