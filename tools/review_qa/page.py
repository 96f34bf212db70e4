"""The page on which pairs are judged: one HTML file that needs no server and loads nothing.

Every text on it comes from a model or an outsider; `paligemma_med.page` keeps them inert.
"""

import hashlib
import pathlib

from paligemma_med import page
from paligemma_med.pp import rows as row_keys
from tools.review_qa import pictures, rows

HERE = pathlib.Path(__file__).parent
VERDICTS = ("keep", "discard", "unsure")


def make(chosen, total, *, name, seed, find=()) -> tuple:
    """The page as HTML text.

    Args:
      chosen: rows in the order in which they are shown; rows of one image are adjacent.
      total: how many rows the file has.
      name: the file's name, and that of the CSV that the page saves.
      seed: of the sample, shown on the page.
      find: functions from `pictures.open_pictures`, tried in order.

    Returns:
      (html, number of images that weren't found).

    Raises:
      ValueError: jinja2 isn't installed.
    """
    cards, missing = {}, 0
    for row in chosen:
        card = cards.get(row["image_id"])
        if card is None:
            card = cards[row["image_id"]] = _card(row, find)
            missing += not card["image"]
        card["pairs"].append(_pair(row))
    sample = hashlib.sha256("\0".join(map(rows.digest, chosen)).encode()).hexdigest()[:12]
    text = page.render(
        HERE,
        "page.html.jinja",
        style="page.css",
        script="page.js",
        cards=list(cards.values()),
        count=len(chosen),
        total=total,
        name=name,
        seed=seed,
        key=f"review_qa:{name}:{sample}",
        verdicts=VERDICTS,
    )
    return text, missing


def _card(row, find):
    image, why = None, "no image: none was asked for (--images)" if not find else "image not found"
    content = next(filter(None, (f(row["image_id"]) for f in find)), None)
    if content:
        try:
            image = page.data_url(pictures.shrunk(content), "image/jpeg")
        except ValueError as e:
            why = f"image broken: {e}"
    keys = ("case_id", "location", "split")
    return dict(
        image_id=row["image_id"],
        image=image,
        why=why,
        caption=_text(row.get("caption")),
        about=[(k, row[k]) for k in keys if _text(row.get(k))],
        pairs=[],
    )


def _pair(row):
    quality = row.get("quality") if isinstance(row.get("quality"), dict) else {}
    tags = quality.get("tags")
    letter = _text(row.get("answer_letter"))
    choices = [(k[-1].upper(), row[k]) for k in row_keys.CHOICES if _text(row.get(k))]
    return dict(
        question_id=row["question_id"],
        digest=rows.digest(row),
        question=row["question"],
        answer=row["answer"],
        template=rows.template(row),
        choices=[(a, text, a == letter) for a, text in choices],
        scores=[
            (k.replace("_", " "), f"{v:.2f}")
            for k, v in quality.items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        ],
        tags=[str(t).replace("_", " ") for t in tags] if isinstance(tags, list) else [],
    )


def _text(value):
    return value if isinstance(value, str) else ""
