"""Made-up files in MedPix 2.0's layout, for tests: no case, text or image is a real one."""

import io
import json
import pathlib
from typing import Any

import numpy as np
import PIL.Image

IMAGES_PER_CASE = 2
CASES = {"train": 4, "dev": 2, "test": 2}


def case_ids() -> dict[str, list[str]]:
    """Case ids by split, as in uid_list.json."""
    ids, first = {}, 1000
    for split, n in CASES.items():
        ids[split] = [f"MPX{first + i}" for i in range(n)]
        first += n
    half = len(ids["train"]) // 2
    return ids | {"train_1": ids["train"][:half], "train_2": ids["train"][half:]}


def images_of(case_id: str) -> list[str]:
    """Ids of a case's images."""
    return [f"{case_id}_synpic{case_id[3:]}{k}" for k in range(IMAGES_PER_CASE)]


def release() -> dict[str, Any]:
    """{"cases": ..., "descriptions": ..., "uid_list": ...} as the JSON files hold them."""
    cases, descriptions = [], []
    uid_list = case_ids()
    for n, case_id in enumerate(c for split in CASES for c in uid_list[split]):
        ct = n % 2 == 0
        ids = images_of(case_id)
        case = {
            "Title": f"Finding {n}",
            "History": f"{50 + n}-year-old",
            "Exam": "N/A",
            "Findings": f"A shadow.\n\n\u2022 number  {n}",
            "Differential Diagnosis": f"This {n}\nThat {n}",
            "Case Diagnosis": f"Disease {n}",
        }
        if n % 3 == 0:  # optional keys of a case
            case["Discussion"] = f"Discussed {n}"
        cases.append(
            {
                "U_id": case_id,
                "TAC": ids if ct else [],
                "MRI": [] if ct else ids,
                "Case": case,
                "Topic": {
                    "Title": f"Topic {n}",
                    "Disease Discussion": f"About disease {n}.",
                    "ACR Code": "8.9",
                    "Category": "Neoplasm, benign",
                },
            }
        )
        for k, image_id in enumerate(ids):
            descriptions.append(
                {
                    "Type": "CT" if ct else "MR",
                    "U_id": case_id,
                    "image": image_id,
                    "Description": {
                        "ACR Codes": "8.-1",
                        "Age": "0",
                        "Caption": f"Shadow {n} in\nimage {k}.",
                        "Figure Part": None,
                        "Modality": "CT - noncontrast" if ct else "MR - T2 weighted",
                        "Plane": ("Axial", "Coronal")[k],
                        "Sex": "N/A" if n % 2 else "male",
                    },
                    "Location": "Genitourinary",
                    "Location Category": "Abdomen" if ct else "Head",
                }
            )
    return {"cases": cases, "descriptions": descriptions, "uid_list": uid_list}


def write(folder: pathlib.Path, content: dict[str, Any] | None = None, pixels: int = 24) -> pathlib.Path:
    """Writes a release with its images: PNG, some with an opaque alpha channel."""
    content = content or release()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "splitted_dataset").mkdir(exist_ok=True)
    _json(folder / "Case_topic.json", content["cases"])
    _json(folder / "Descriptions.json", content["descriptions"])
    _json(folder / "splitted_dataset" / "uid_list.json", content["uid_list"])
    for split in CASES:
        cases = content["uid_list"][split]
        rows = [d for d in content["descriptions"] if d["U_id"] in cases]
        _lines(folder / "splitted_dataset" / f"descriptions_{split}.jsonl", rows)
        # In these files absent keys are null, and keys are sorted.
        rows = [
            dict(c, Case=dict(sorted(({"Discussion": None, "Media": None} | c["Case"]).items())))
            for c in content["cases"]
            if c["U_id"] in cases
        ]
        _lines(folder / "splitted_dataset" / f"data_{split}.jsonl", rows)
    for row in content["descriptions"]:
        (folder / "images" / f"{row['image']}.png").write_bytes(image(row["image"], pixels))
    return folder


def image(key: str, pixels: int = 24) -> bytes:
    """A PNG that differs from that of any other key."""
    rng = np.random.default_rng(list(key.encode()))
    rgba = rng.integers(0, 255, (pixels, pixels, 4), np.uint8)
    rgba[..., 3] = 255
    out = io.BytesIO()
    PIL.Image.fromarray(rgba if key[-1] == "1" else rgba[..., :3]).save(out, "PNG")
    return out.getvalue()


def write_qa(path: pathlib.Path) -> pathlib.Path:
    """Two pairs per image as the authors released theirs: one JSON object after another."""
    text = ""
    for case_id in (c for split in CASES for c in case_ids()[split]):
        for k, image_id in enumerate(images_of(case_id)):
            q, a = ("Q:", "A:") if k else ("**Q1:**", "**A1:**")
            raw = f"Here are 2 pairs:\n\n{q} What is shown?\n{a} A shadow.\n\n{q} Why {k}?\n{a} No"
            row = {"U_id": case_id, "image_id": image_id, "qa_pairs_raw": raw}
            text += json.dumps(row, indent=4) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def _json(path: pathlib.Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _lines(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
