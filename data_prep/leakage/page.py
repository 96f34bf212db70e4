"""The page of pairs: two pictures beside each other, how they were found, and what both are asked.

One file that loads nothing: images are in it, small, and its content policy allows its own style alone. All texts come
from data sets and are escaped.
"""

import base64
import hashlib
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from data_prep.leakage.compare import WAYS, Pair
from data_prep.leakage.records import Picture
from paligemma_med.pp import images

_SIDE = 192  # pixels of the longer side of a picture shown
_QUESTIONS = 3  # of a pair
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .25rem .6rem; border-bottom: 1px solid #8885; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } tr.test td { font-weight: 600; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(25rem, 1fr)); gap: 1rem; }
.pair { border: 1px solid #8886; border-radius: .5rem; padding: .6rem; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; } figure { margin: 0; }
img { width: 100%; height: 12rem; object-fit: contain; background: #000; }
figcaption, .small { font-size: .85rem; } .pair p { margin: .4rem 0 0; } dl { margin: .4rem 0 0; font-size: .85rem; }
dt { font-weight: 600; } dd { margin: 0 0 .3rem; }
@media (max-width: 30rem) { .pairs { grid-template-columns: 1fr; } }
"""


def small(content: bytes) -> str:
    """A data URL of a picture at the size shown; "" if it can't be read."""
    try:
        picture = PIL.Image.fromarray(images.decode(content).rgb)
    except ValueError:
        return ""
    picture.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def render(sets: Mapping[str, Any], sections: Sequence[Mapping[str, Any]], shown: int) -> str:
    """The page.

    Args:
      sets: {name: {"folder": …, "splits": {split: {"images": …, "rows": …}}}}.
      sections: of each two splits that have anything in common: "a", "b" (their names), "counts", "pairs" (those shown,
        each (Pair, Picture, Picture, URL, URL)), and "of", how many there are.
      shown: how many pairs of two splits are shown at most.
    """
    policy = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    named = " and ".join(map(html.escape, sets)) if len(sets) < 3 else f"{len(sets)} data sets"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'sha256-{policy}'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Leakage: {named}</title><style>{STYLE}</style></head><body>",
        f"<h1>What {named} have in common</h1>" if len(sets) > 1 else f"<h1>What the splits of {named} share</h1>",
        _sets(sets),
        _summary(sections),
        *(_section(section, shown) for section in sections),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _sets(sets: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(split)}</td><td class=n>{count['rows']:,}</td>"
        f"<td class=n>{count['images']:,}</td></tr>"
        for name, one in sets.items()
        for split, count in one["splits"].items()
    ]
    head = "<tr><th>data set</th><th>split</th><th class=n>questions</th><th class=n>different images</th></tr>"
    return f"<div class=wide><table>{head}{''.join(rows)}</table></div>"


def _summary(sections: Sequence[Mapping[str, Any]]) -> str:
    if not sections:
        return "<p>Nothing was found in common.</p>"
    head = "".join(f"<th class=n>{html.escape(way)}</th>" for way in WAYS)
    rows = []
    for number, s in enumerate(sections):
        cells = "".join(f"<td class=n>{_both(s['counts'][k])}</td>" for k in WAYS)
        test = " class=test" if s["b"].endswith("test") or s["a"].endswith("test") else ""
        rows.append(
            f"<tr{test}><td><a href='#s{number}'>{html.escape(s['a'])}</a></td><td>{html.escape(s['b'])}</td>{cells}"
            f"<td class=n>{s['counts']['questions']:,}</td><td class=n>{s['counts']['answers']:,}</td></tr>"
        )
    ways = "".join(f"<dt>{html.escape(way)}</dt><dd>{html.escape(what)}</dd>" for way, what in WAYS.items())
    return (
        f"<div class=wide><table><tr><th>A</th><th>B</th>{head}<th class=n>same question</th>"
        f"<th class=n>and answer</th></tr>{''.join(rows)}</table></div>"
        "<p>Numbers are different images of A with a partner in B; where B's differ, of B after the stroke. Bold: a "
        "test split.</p>"
        f"<dl>{ways}</dl><p class=small>Pictures that are alike may be copies, neighbouring slices of one scan, or two "
        "of one kind: look at them. Cropped, turned and mirrored copies aren't found.</p>"
    )


def _both(count: Mapping[str, int]) -> str:
    return f"{count['a']:,}" if count["a"] == count["b"] else f"{count['a']:,} / {count['b']:,}"


def _section(section: Mapping[str, Any], shown: int) -> str:
    number = section["number"]
    title = f"<h2 id=s{number}>{html.escape(section['a'])} and {html.escape(section['b'])}</h2>"
    if not section["of"]:
        return f"{title}<p>Figures of the same articles only, no image.</p>"
    note = f"<p>{section['of']:,} pairs" + (f", the first {shown:,} shown" if section["of"] > shown else "") + ".</p>"
    cards = "".join(_card(section["a"], section["b"], *pair) for pair in section["pairs"])
    return f"{title}{note}<div class=pairs>{cards}</div>"


def _card(a: str, b: str, pair: Pair, one: Picture, other: Picture, url: str, other_url: str) -> str:
    figures = "".join(
        f"<figure><img alt='{html.escape(p.image_id)}' src='{u}'><figcaption>{html.escape(name)}<br>"
        f"{html.escape(p.image_id)}</figcaption></figure>"
        for name, p, u in ((a, one, url), (b, other, other_url))
    )
    ways = ", ".join(
        f"{WAYS[w]}" if w != "look" else f"alike ({pair.distance} bits of a hash differ)" for w in pair.ways
    )
    again = "".join(
        f"<dt>{html.escape(q)}</dt><dd>{html.escape(x)} | {html.escape(y)}</dd>" for q, x, y in pair.again[:_QUESTIONS]
    )
    more = f"<p class=small>and {len(pair.again) - _QUESTIONS} more</p>" if len(pair.again) > _QUESTIONS else ""
    told = f"<p class=small>both are asked:</p><dl>{again}</dl>{more}" if again else ""
    return f"<div class=pair><div class=two>{figures}</div><p>{html.escape(ways)}</p>{told}</div>"
