"""The page on which pairs are judged: one HTML file that needs no server and reaches nothing.

Every text on it comes from a model or a stranger. Jinja escapes them all, and the page's content
policy lets nothing run but its own script, by its digest, and nothing load but images in the page.
"""

import base64
import hashlib
import pathlib

from tools.review_qa import pictures, rows

HERE = pathlib.Path(__file__).parent
VERDICTS = ("keep", "discard", "unsure")


def make(chosen, total, *, name, seed, find=()):
    """The page as text.

    Args:
      chosen: rows in the order in which they are shown; those of one image stand together.
      total: how many rows the file has.
      name: of the file; also of the CSV that the page saves.
      seed: of the drawing, to be told.
      find: functions of `pictures.open_pictures`, asked in turn.

    Returns:
      (html, number of images that weren't found).

    Raises:
      ValueError: jinja2 isn't installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ValueError("tools.review_qa needs jinja2; pip install 'paligemma_med[report]'.") from None
    cards, missing = {}, 0
    for row in chosen:
        card = cards.get(row["image_id"])
        if card is None:
            card = cards[row["image_id"]] = _card(row, find)
            missing += not card["image"]
        card["pairs"].append(_pair(row))
    sample = hashlib.sha256("\0".join(map(rows.digest, chosen)).encode()).hexdigest()[:12]
    style, script = ((HERE / n).read_text(encoding="utf-8") for n in ("page.css", "page.js"))
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = env.get_template("page.html.jinja").render(
        cards=list(cards.values()),
        count=len(chosen),
        total=total,
        name=name,
        seed=seed,
        key=f"review_qa:{name}:{sample}",
        verdicts=VERDICTS,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return text.encode("utf-8", "replace").decode(), missing


def _hash(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _card(row, find):
    image, why = None, "no image: none was asked for (--images)" if not find else "image not found"
    content = next(filter(None, (f(row["image_id"]) for f in find)), None)
    if content:
        try:
            image = "data:image/jpeg;base64," + base64.b64encode(pictures.shrunk(content)).decode()
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
    choices = [(k[-1].upper(), row[k]) for k in rows.CHOICES if _text(row.get(k))]
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
