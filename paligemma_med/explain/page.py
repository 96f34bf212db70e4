"""A saliency report as one HTML page that an expert can work with, and the index of many of them.

Made with `paligemma_med.page`, so that nothing in a question or a file name is executed; the script
inserts text as text, never as HTML.

Arrays travel in the page as base64, each row divided by its largest value: as float16, or, where
raw attention would be megabytes, as uint8 on a square-root scale (`pack`); the page says which.

`report.Report` lists what a report holds.
"""

import base64
import io
import math
import pathlib

import numpy as np
import PIL.Image

from paligemma_med import page
from paligemma_med.page import clean
from paligemma_med.pp import boxes
from paligemma_med.saliency.methods import KINDS

FOLDER = pathlib.Path(__file__).parent
MAX_SIDE = 768  # pixels of the picture in the page
MAX_RAW = 400_000  # numbers of raw attention that are kept as float16

LEAST = 0.1  # nats: the scale of a signed map reaches at least this far

# Stops of matplotlib's viridis and cividis (both CC0), grey, and PuOr for signed maps
# (ColorBrewer): all readable with every kind of colour vision.
COLOURS = {
    "viridis": "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73"
    " 5ec962 84d44b addc30 d8e219 fde725",
    "cividis": "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072"
    " bcae6c cdbb63 dec958 f0d846 fee838",
    "grey": "000000 ffffff",
    "signed": "5d3790 988dbe cecde4 f6f6f7 fed7a2 ef9e3c be630a",
}


def render(report) -> str:
    """The page of a report, as HTML text.

    Raises:
      ValueError: jinja2 isn't installed; an array holds NaN or has another shape.
    """
    check(report)
    return _page("page", report=_texts(report), data=data_of(report))


def render_index(rows, title) -> str:
    """The index of many reports, in the order given.

    Args:
      rows: list of dict(name, question, answer, given (the right answer or ""), probability float or None,
        flags list of dict(name, says), thumb by `data_url` or None, href relative address or None, error str or None).
      title: the page's.
    """
    names = sorted({f["name"] for row in rows for f in row["flags"]})
    return _page("index", rows=clean(rows), names=clean(names), title=clean(title))


def overlay(picture, values, *, colours="viridis", opacity=0.7, top=None, signed=None) -> np.ndarray:
    """A map over a picture, as the page draws it: colour by value, opacity by its square root.

    Args:
      picture: uint8[H, W, 3].
      values: float[h, w].
      colours: one of COLOURS.
      opacity: of the largest value.
      top: value that gets the last colour; by default the map's largest magnitude.
      signed: colours from purple to orange around 0; by default if any value is negative.

    Returns:
      uint8[H, W, 3].
    """
    values = np.asarray(values, np.float64)
    top = top or np.abs(values).max() or 1.0
    t = np.clip(values / top, -1, 1)
    signed = (t < 0).any() if signed is None else signed
    stops = colour_stops("signed" if signed else colours)
    place = ((t + 1) / 2 if signed else t) * (len(stops) - 1)
    colour = np.stack([np.interp(place, np.arange(len(stops)), c) for c in stops.T], axis=-1)
    alpha = opacity * np.sqrt(np.abs(t))
    height, width = picture.shape[:2]
    ys = np.arange(height) * values.shape[0] // height
    xs = np.arange(width) * values.shape[1] // width
    alpha = alpha[ys][:, xs, None]
    out = alpha * colour[ys][:, xs] + (1 - alpha) * picture
    return np.floor(out + 0.5).astype(np.uint8)


def colour_stops(name) -> np.ndarray:
    """float64[stops, 3] of 0…255."""
    stops = [[int(s[i : i + 2], 16) for i in (0, 2, 4)] for s in COLOURS[name].split()]
    return np.array(stops, np.float64)


def content(report) -> np.ndarray:
    """int[…] tokens that the whole answer's map covers: all but EOS, unless EOS is the only one."""
    r = len(report.tokens)
    return np.arange(r - (report.ended and r > 1))


def whole(method, values) -> np.ndarray:
    """float[tokens, …] of one method → float[…] of all those tokens: the mean, or the sum for drops of
    log-probability."""
    return values.sum(0) if KINDS[method].signed else values.mean(0)


def check(report) -> None:
    """Raises ValueError if arrays don't fit together: a page would show them shifted."""
    h, w = report.grid
    patches, prompt, r = h * w, len(report.prompt), len(report.tokens)
    s = patches + prompt + r
    raw = np.shape(report.raw)
    expected = {"raw": raw[:2] + (r, s), "mass": raw[:2] + (r, 3), "logprobs": (r,)}
    if report.raw_constants is not None:
        expected["raw_constants"] = raw[:2] + (r,)
    for name, shape in expected.items():
        if np.shape(getattr(report, name)) != shape:
            raise ValueError(f"{name} has shape {np.shape(getattr(report, name))}; expected {shape}.")
    arrays = {name: getattr(report, name) for name in expected}
    for m in report.maps:
        name = " ".join(filter(None, (m.method, m.variant)))
        if m.method not in KINDS:
            raise ValueError(f"a map is of {m.method!r}; expected one of {sorted(KINDS)}.")
        if np.shape(m.values) not in ((r, patches), (r, s)):
            raise ValueError(f"the map {name} has shape {np.shape(m.values)}; expected {(r, patches)} or {(r, s)}.")
        if m.constants is not None and np.shape(m.constants) != (r,):
            raise ValueError(f"the map {name} has constants of shape {np.shape(m.constants)}; expected {(r,)}.")
        arrays[name] = m.values
    if report.regions:
        arrays["regions"] = report.regions.logprobs
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinity; expected numbers.")


# --- What goes into the page ---


def data_of(report) -> dict:
    """What the page's script reads, as a dict for JSON."""
    raw = np.asarray(report.raw)
    regions = report.regions
    return dict(
        grid=list(report.grid),
        prompt=clean(report.prompt),
        tokens=clean(report.tokens),
        logprobs=_floats(report.logprobs),
        raw=pack(raw, "u1" if raw.size > MAX_RAW else "f2"),
        layers=raw.shape[0],
        heads=raw.shape[1],
        mass=pack(report.mass),
        raw_constants=None if report.raw_constants is None else pack(report.raw_constants),
        maps=[
            {
                **m._asdict(),
                "values": pack(m.values),
                "constants": None if m.constants is None else _floats(m.constants),
            }
            for m in report.maps
        ],
        methods={k: [kind.title, kind.says] for k, kind in KINDS.items()},
        signed=[k for k, kind in KINDS.items() if kind.signed],
        shares=[k for k, kind in KINDS.items() if kind.shares],
        least=LEAST,
        first=first_method(report),
        content=content(report).tolist(),
        occlusion=report.occlusion,
        regions=regions
        and dict(
            fill=regions.fill,
            boxes=np.asarray(regions.boxes).tolist(),
            logprobs=[_floats(x) for x in np.asarray(regions.logprobs)],
        ),
        boxes=[list(box) for box in boxes.read(report.answer).boxes],
        colours=COLOURS,
    )


def pack(x, kind="f2") -> dict:
    """An array for JSON: dict(type, shape, tops, data), the last two base64, little-endian.

    Each row (last axis) is divided by its largest magnitude, `tops` float32. "f2" keeps the rest as
    float16 (error at most 2^-11 of a value); "u1" as round(255·sqrt(value)), for values that aren't
    negative (error at most 0.4 % of the row's largest value).
    """
    x = np.asarray(x, np.float32)
    tops = np.abs(x).max(-1, keepdims=True).astype("<f4")
    rows = x / np.where(tops > 0, tops, 1)
    if kind == "u1":
        if (rows < 0).any():
            raise ValueError("u1 is for values that aren't negative; found a negative one.")
        rows = np.floor(255 * np.sqrt(rows) + 0.5).astype("u1")
    else:
        rows = rows.astype("<f2")
    return dict(type=kind, shape=list(x.shape), tops=_base64(tops), data=_base64(rows))


def unpack(packed) -> np.ndarray:
    """The reverse of `pack`, float32, as the page's script computes it."""
    rows = np.frombuffer(base64.b64decode(packed["data"]), "<" + packed["type"])
    rows = rows.astype(np.float32).reshape(packed["shape"])
    tops = np.frombuffer(base64.b64decode(packed["tops"]), "<f4")
    if packed["type"] == "u1":
        rows = (rows / 255) ** 2
    return rows * tops.reshape(*packed["shape"][:-1], 1)


def _base64(x):
    return base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()


def _floats(x):
    return [float(np.float32(v)) for v in x]


def data_url(pixels, side=MAX_SIDE) -> str:
    """An image as a data: URL: PNG, at most `side` pixels wide and high."""
    image = PIL.Image.fromarray(np.asarray(pixels, np.uint8))
    if max(image.size) > side:
        image.thumbnail((side, side), PIL.Image.Resampling.LANCZOS)
    if np.ptp(np.asarray(image), axis=-1).max() == 0:
        image = image.convert("L")  # grey stored as RGB: a third of the bytes
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return page.data_url(out.getvalue(), "image/png")


def _texts(report):
    """What the template reads: texts, image URLs, rounded figures."""
    logprobs = np.asarray(report.logprobs, np.float64)
    mask = report.mask
    h, w = report.grid
    raw = np.shape(report.raw)
    out = clean(
        {
            k: getattr(report, k)
            for k in ("title", "question", "answer", "given", "prompt", "samples", "controls", "flags")
        }
    )
    return dict(
        **{k: v for k, v in out.items() if k not in ("tokens", "samples")},
        about=clean([list(x) for x in report.about]),
        grid=(h, w),
        heads=raw[1],
        probability=percent(logprobs.sum()),
        logprob=f"{logprobs.sum():.2f}".replace("-0.00", "0.00"),
        size=report.picture.shape[:2],
        picture=data_url(report.picture),
        seen=data_url(report.seen),
        seen_size=report.seen.shape[:2],
        tokens=[
            dict(text=t, probability=percent(p), others=[(o, share(q)) for o, q in others])
            for t, p, others in zip(clean(report.tokens), logprobs, clean(report.others), strict=True)
        ],
        mass=np.asarray(report.mass, np.float64).mean((1, 2)),
        causal=report.causal,
        agreement=_agreement(out["samples"], out["answer"]),
        samples=_counted(out["samples"]),
        mask=mask
        and dict(
            fill=mask.fill,
            answer=clean(mask.answer),
            picture=data_url(mask.picture),
            probability=percent(np.sum(mask.logprobs)),
            tokens=[(t, percent(a), percent(b)) for t, a, b in zip(clean(report.tokens), logprobs, mask.logprobs)],
        ),
        **_boxes(report.answer),
        quantised=np.size(report.raw) > MAX_RAW,
        regions=bool(report.regions),
        occlusion=report.occlusion,
        methods={k: (KINDS[k].title, KINDS[k].says) for k in _methods(report)},
    )


def _boxes(answer):
    """The boxes that an answer has, read strictly: names, percent of the picture's sides; and pieces that are none."""
    said = boxes.read(answer)
    sides = [[f"{100 * x:.0f}" for x in box] for box in said.boxes]
    return dict(boxes=list(zip(clean(list(said.labels)), sides)), malformed=clean(list(said.malformed)))


def first_method(report) -> str:
    """The kind of map that a page opens with: one that depends on the answer, if it was computed."""
    return max(_methods(report), key=lambda k: KINDS[k].preferred)


def _methods(report):
    found = {m.method for m in report.maps} | {"raw"}
    return [k for k in KINDS if k in found]


def _agreement(samples, answer):
    """(how many samples agree with the answer, of how many)."""
    said = [s["answer"].strip().lower() for s in samples]
    return sum(s == answer.strip().lower() for s in said), len(said)


def _counted(samples):
    """Equal answers merged, most frequent first: dict(answer, logprob, times)."""
    out = {}
    for s in samples:
        found = out.setdefault(s["answer"], dict(s, times=0))
        found["times"] += 1
    return sorted(out.values(), key=lambda s: (-s["times"], -s["logprob"]))


def percent(logprob) -> str:
    """A log-probability as text: "93 %", "0.4 %", "below 0.01 %"; never "100 %"."""
    return share(math.exp(min(float(logprob), -1e-6)))


def share(p) -> str:
    """A share as text with a non-breaking blank; nearly 1 isn't rounded to 100 %, nor nearly 0 to 0 %."""
    if 0.995 <= p < 1:
        return f"{100 * p:.1f}\u00a0%" if p < 0.9995 else "over 99.9\u00a0%"
    if p < 1e-4:
        return "below 0.01\u00a0%"
    return f"{100 * p:.0f}\u00a0%" if p >= 0.1 else f"{100 * p:.2g}\u00a0%"


def _page(name, **values):
    filters = dict(percent=percent, share=share)
    return page.render(FOLDER, f"{name}.html.jinja", style="page.css", script=f"{name}.js", filters=filters, **values)
