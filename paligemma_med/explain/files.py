"""The files of one report: its page, its exact arrays, its maps as pictures."""

import io
import json
import os
import re

import numpy as np
import PIL.Image

from paligemma_med.explain import page
from paligemma_med.files import whole_file
from paligemma_med.saliency.methods import KINDS


def write_page(made, path) -> None:
    """Writes the page of a report, whole or not at all."""
    with whole_file(path) as f:
        f.write(page.render(made).encode())


def write_npz(made, path) -> None:
    """Writes all arrays of a report, exactly: raw, mass, logprobs, grid, <method> or <method>_<variant>, …, what of
    their rows is on learned constants as raw_on_constants, <method>_<variant>_on_constants, …,
    and `texts`, JSON as UTF-8 bytes in an array (no pickle)."""
    arrays = {k: np.asarray(getattr(made, k)) for k in ("raw", "mass", "logprobs", "grid", "picture", "seen")}
    for m in made.maps:
        name = slug("_".join(filter(None, (m.method, m.variant))))
        arrays[name] = np.asarray(m.values)
        if m.constants is not None:
            arrays[f"{name}_on_constants"] = np.asarray(m.constants)
    if made.raw_constants is not None:
        arrays["raw_on_constants"] = np.asarray(made.raw_constants)
    for key in ("boxes", "logprobs") if made.regions else ():
        arrays[f"regions_{key}"] = np.asarray(getattr(made.regions, key))
    if made.mask:
        arrays["mask_logprobs"] = np.asarray(made.mask.logprobs)
    keys = ("title", "question", "answer", "prompt", "tokens", "samples", "controls", "flags", "about", "occlusion")
    texts = {k: getattr(made, k) for k in keys}
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    with whole_file(path) as f:
        np.savez_compressed(f, **arrays)


def write_pngs(made, folder, prefix="") -> None:
    """Writes each method's map over the picture, for the whole answer and for each token:
    <prefix><method>_all.png, …_00.png. Tokens of one method share a scale."""
    grid, patches = made.grid, made.grid[0] * made.grid[1]
    chosen = {"raw": made.raw.mean((0, 1))}
    for m in made.maps:
        chosen.setdefault(m.method, m.values)
    picture = np.asarray(_shrunk(made.picture).convert("RGB"))
    for method, values in chosen.items():
        values = np.asarray(values)[:, :patches].reshape(-1, *grid)
        whole = page.whole(method, values[page.content(made)])
        least = page.LEAST if KINDS[method].signed else 0.0

        def top(x, least=least):
            return max(float(np.abs(x).max()), least) or 1.0

        for name, x, scale in [("all", whole, top(whole))] + [
            (f"{r:02d}", x, top(values)) for r, x in enumerate(values)
        ]:
            with whole_file(os.path.join(folder, f"{prefix}{method}_{name}.png")) as f:
                f.write(_png(page.overlay(picture, x, top=scale, signed=KINDS[method].signed)))


def _shrunk(pixels):
    image = PIL.Image.fromarray(pixels)
    image.thumbnail((page.MAX_SIDE, page.MAX_SIDE))
    return image


def _png(pixels):
    out = io.BytesIO()
    _shrunk(pixels).save(out, "PNG")
    return out.getvalue()


def slug(text, limit=40) -> str:
    """A text as part of a file's name: ASCII letters, digits and _."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:limit] or "x"
