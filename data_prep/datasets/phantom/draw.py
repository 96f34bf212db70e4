"""Draws the phantoms: a head CT or MRI, a chest film, an abdomen CT, with at most one finding.

Anatomy is a few soft-edged ellipses in body coordinates (x to the right of the image, y down, both
-1..1). Images of the same kind vary as in a clinic: position of the body (shift, rotation, size), shapes
of organs, exposure, noise. Findings are large and clear (radius at least 8 % of the image width) so that
a model of a million parameters can learn them at 64 pixels; the variation keeps it from looking up
pixels.

"left" and "right" are sides of the image as the viewer sees it, never the patient's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image

SIZE = 128
FINDINGS = {
    "Head": ("Hemorrhage", "Infarct", "Mass"),
    "Chest": ("Nodule", "Opacity", "Effusion"),
    "Abdomen": ("Cyst", "Stone", "Mass"),
}
MODALITIES = {"Head": ("CT", "MRI"), "Chest": ("X-Ray",), "Abdomen": ("CT",)}
# A finding's centre keeps this distance from both middle lines of the image (in half widths), so that
# its side and level are unambiguous after rotation and shift.
MARGIN = 0.12
MIN_RADIUS = 0.16  # in half widths: 8 % of the image width


@dataclasses.dataclass(frozen=True)
class Finding:
    """kind: one of `FINDINGS`; side: "Left" or "Right" of the image; level: "Upper" or "Lower"."""

    kind: str
    side: str
    level: str


@dataclasses.dataclass
class _Body:
    """Body coordinates of every pixel, and the conversion from body to image coordinates."""

    x: np.ndarray
    y: np.ndarray
    scale: float
    angle: float
    shift: tuple[float, float]

    def to_image(self, x: float, y: float) -> tuple[float, float]:
        c, s = np.cos(self.angle), np.sin(self.angle)
        return (
            self.scale * (c * x - s * y) + self.shift[0],
            self.scale * (s * x + c * y) + self.shift[1],
        )


def _body(rng: np.random.Generator) -> _Body:
    line = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
    px, py = np.meshgrid(line, line)
    scale = rng.uniform(0.9, 1.04)
    angle = np.deg2rad(rng.uniform(-6, 6))
    shift = tuple(rng.uniform(-0.04, 0.04, 2))
    px, py = (px - shift[0]) / scale, (py - shift[1]) / scale
    c, s = np.cos(angle), np.sin(angle)
    return _Body(c * px + s * py, c * py - s * px, scale, angle, shift)


def _step(distance: np.ndarray, edge: float) -> np.ndarray:
    """1 inside (positive distance), 0 outside, with a soft edge of about `edge` half widths."""
    return 1 / (1 + np.exp(np.clip(-4 * distance / edge, -30, 30)))


def _ellipse(
    b: _Body, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, edge: float = 0.03
) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    dx, dy = b.x - cx, b.y - cy
    u, v = (c * dx + s * dy) / rx, (c * dy - s * dx) / ry
    return _step((1 - np.sqrt(u * u + v * v)) * min(rx, ry), edge)


def _blob(rng: np.random.Generator, b: _Body, cx: float, cy: float, r: float, rough: float, edge: float) -> np.ndarray:
    """A circle with a wavy outline: `rough` is the waves' height as a share of the radius."""
    dx, dy = b.x - cx, b.y - cy
    phi = np.arctan2(dy, dx)
    outline = np.ones_like(phi)
    for k in (2, 3, 5):
        outline += rough * rng.uniform(0.3, 1) / np.sqrt(k) * np.cos(k * phi + rng.uniform(0, 6.3))
    return _step(r * outline - np.hypot(dx, dy), edge)


def _texture(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of about unit height, with `cells` bumps across the image."""
    small = rng.normal(size=(cells, cells)).astype(np.float32)
    large = PIL.Image.fromarray(small).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
    return np.asarray(large)


def _over(image: np.ndarray, mask: np.ndarray, value: Any) -> np.ndarray:
    return image + mask * (value - image)


Placed = list[tuple[str, float, float, float, float]]  # label, centre x y, radii x y (body)
# What an anatomy consists of: the image, where findings can be, its organs, and the box (|x|, |y|) from
# which a finding's centre is drawn.
Anatomy = tuple[np.ndarray, np.ndarray, Placed, tuple[tuple[float, float], tuple[float, float]]]


def _head(rng: np.random.Generator, b: _Body, modality: str) -> Anatomy:
    rx, ry = rng.uniform(0.68, 0.76), rng.uniform(0.82, 0.9)
    mri = modality == "MRI"
    image = np.zeros_like(b.x) + 0.02
    if mri:  # bright fat around a dark skull
        image = _over(image, _ellipse(b, 0, 0, rx, ry), rng.uniform(0.7, 0.9))
        image = _over(image, _ellipse(b, 0, 0, rx - 0.05, ry - 0.05), 0.08)
        brain = _ellipse(b, 0, 0, rx - 0.11, ry - 0.11)
        image = _over(image, brain, rng.uniform(0.34, 0.4) + 0.04 * _texture(rng, 24))
        white = _blob(rng, b, 0, 0, 0.48, 0.16, 0.06) * _ellipse(b, 0, 0, rx - 0.2, ry - 0.2)
        image = _over(image, white, rng.uniform(0.52, 0.58))
    else:
        image = _over(image, _ellipse(b, 0, 0, rx + 0.03, ry + 0.03), 0.3)
        image = _over(image, _ellipse(b, 0, 0, rx, ry), rng.uniform(0.9, 1.0))
        brain = _ellipse(b, 0, 0, rx - 0.09, ry - 0.09)
        image = _over(image, brain, rng.uniform(0.42, 0.5) + 0.03 * _texture(rng, 20))
    falx = _step(0.012 - np.abs(b.x), 0.02) * (np.abs(b.y) > 0.3) * brain
    image = _over(image, falx, 0.2 if mri else 0.62)
    length, width = rng.uniform(0.14, 0.2), rng.uniform(0.035, 0.06)
    for side in (-1, 1):
        for y, lean in ((-0.12, 1), (0.14, -1)):
            horn = _ellipse(b, side * (width + 0.035), y, width, length, -side * lean * 0.35)
            image = _over(image, horn, 0.1 if mri else 0.22)
    organs = [("Brain", 0.0, 0.0, rx - 0.1, ry - 0.1)]
    return image, brain, organs, ((0.26, 0.36), (0.26, 0.46))


def _chest(rng: np.random.Generator, b: _Body, modality: str) -> Anatomy:
    del modality
    image = np.zeros_like(b.x) + 0.05
    trunk = _ellipse(b, 0, 0.35, 0.95, 1.45, edge=0.06)
    image = _over(image, trunk, rng.uniform(0.5, 0.6))
    lung_x, lung_rx = rng.uniform(0.43, 0.47), rng.uniform(0.32, 0.37)
    lung_ry, lung_y = rng.uniform(0.64, 0.7), rng.uniform(-0.06, 0.0)
    base = rng.uniform(0.48, 0.56)  # the diaphragm
    dome = _step(base + 0.12 * ((np.abs(b.x) - lung_x) / lung_rx) ** 2 - b.y, 0.04)
    lungs, organs = np.zeros_like(b.x), []
    for side in (-1, 1):
        lungs += _ellipse(b, side * lung_x, lung_y, lung_rx, lung_ry, side * 0.08, edge=0.04)
        top = lung_y - lung_ry
        organs.append(("Lung", side * lung_x, (top + base) / 2, lung_rx, (base - top) / 2))
    lungs = np.minimum(lungs, 1) * dome
    dark = rng.uniform(0.14, 0.22)
    image = _over(image, lungs, dark + 0.02 * _texture(rng, 20))
    # Ribs slope down from the spine; the same period on both sides.
    wave = np.cos(2 * np.pi * (b.y * rng.uniform(3.2, 3.8) - 0.9 * np.abs(b.x) + rng.uniform(0, 1)))
    image = image + 0.09 * trunk * np.clip(wave, 0, 1) ** 3
    image = _over(image, _ellipse(b, 0, 0.2, 0.13, 1.3, edge=0.08), rng.uniform(0.72, 0.8))
    heart_x, heart_rx = rng.uniform(0.08, 0.13), rng.uniform(0.2, 0.27)
    heart = _ellipse(b, heart_x, 0.24, heart_rx, 0.28, 0.5, edge=0.07)
    image = _over(image, heart * 0.9, rng.uniform(0.74, 0.82))
    organs.append(("Heart", heart_x, 0.24, heart_rx, 0.28))
    for side in (-1, 1):
        collar = _ellipse(b, side * 0.45, -0.66, 0.42, 0.035, -side * 0.22)
        image = _over(image, collar * 0.45, 0.85)
    return image, lungs, organs, ((0.4, 0.5), (0.2, 0.34))


def _abdomen(rng: np.random.Generator, b: _Body, modality: str) -> Anatomy:
    del modality
    rx, ry = rng.uniform(0.86, 0.93), rng.uniform(0.66, 0.74)
    image = np.zeros_like(b.x) + 0.02
    image = _over(image, _ellipse(b, 0, 0, rx, ry), 0.24)
    wall = rng.uniform(0.06, 0.1)
    image = _over(image, _ellipse(b, 0, 0, rx - wall, ry - wall), 0.46)
    inner = _ellipse(b, 0, 0, rx - wall - 0.06, ry - wall - 0.05)
    image = _over(image, inner, 0.3 + 0.03 * _texture(rng, 16))
    for _ in range(rng.integers(4, 8)):  # bowel, some of it with a little gas
        cx, cy, r = rng.uniform(-0.15, 0.5), rng.uniform(-0.42, 0.1), rng.uniform(0.07, 0.12)
        image = _over(image, _blob(rng, b, cx, cy, r, 0.15, 0.03) * inner, rng.uniform(0.42, 0.5))
        if rng.random() < 0.4:
            image = _over(image, _ellipse(b, cx, cy - r / 3, r * 0.5, r * 0.3), 0.08)
    organs = []
    parts = [
        ("Liver", -0.4, -0.1, rng.uniform(0.34, 0.4), rng.uniform(0.34, 0.4), 0.25, 0.58),
        ("Spleen", 0.58, 0.04, rng.uniform(0.14, 0.18), rng.uniform(0.22, 0.28), 0.3, 0.56),
        ("Kidney", -0.36, 0.32, 0.13, 0.15, 0.4, 0.66),
        ("Kidney", 0.36, 0.32, 0.13, 0.15, -0.4, 0.66),
    ]
    for label, cx, cy, ex, ey, angle, value in parts:
        cx, cy = cx + rng.uniform(-0.03, 0.03), cy + rng.uniform(-0.03, 0.03)
        tint = value + rng.uniform(-0.03, 0.03) + 0.015 * _texture(rng, 24)
        image = _over(image, _ellipse(b, cx, cy, ex, ey, angle) * inner, tint)
        organs.append((label, cx, cy, ex, ey))
    spine_y = ry - wall - 0.22
    image = _over(image, _ellipse(b, 0, spine_y, 0.14, 0.12), rng.uniform(0.88, 0.98))
    image = _over(image, _ellipse(b, 0, spine_y + 0.13, 0.055, 0.05), 0.4)
    image = _over(image, _ellipse(b, 0.05, spine_y - 0.2, 0.055, 0.055), 0.66)
    return image, inner, organs, ((0.26, 0.5), (0.2, 0.32))


_ANATOMY: dict[str, Callable[[np.random.Generator, _Body, str], Anatomy]] = {
    "Head": _head,
    "Chest": _chest,
    "Abdomen": _abdomen,
}


def _place(
    rng: np.random.Generator, b: _Body, finding: Finding, box: tuple[tuple[float, float], ...]
) -> tuple[float, float]:
    """A centre in body coordinates whose image coordinates are on the finding's side and level."""
    sx = -1 if finding.side == "Left" else 1
    sy = -1 if finding.level == "Upper" else 1
    while True:
        x, y = sx * rng.uniform(*box[0]), sy * rng.uniform(*box[1])
        ix, iy = b.to_image(x, y)
        if sx * ix >= MARGIN and sy * iy >= MARGIN:
            return x, y


def _effusion(
    rng: np.random.Generator, b: _Body, image: np.ndarray, lungs: np.ndarray, side: int
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Fluid at the base of one lung, rising along its outer wall; and its box in body coordinates.

    The box is measured from the drawn fluid: x0, y0, x1, y1.
    """
    top = rng.uniform(0.12, 0.24)
    level = top - 0.35 * np.clip(side * b.x - 0.45, 0, 1)
    mask = lungs * _step(b.y - level, 0.05) * (side * b.x > 0)
    inside = mask > 0.5
    extent = (b.x[inside].min(), b.y[inside].min(), b.x[inside].max(), b.y[inside].max())
    return _over(image, mask, rng.uniform(0.74, 0.82)), tuple(float(v) for v in extent)


def _add_finding(
    rng: np.random.Generator,
    b: _Body,
    image: np.ndarray,
    mask: np.ndarray,
    finding: Finding,
    box: tuple[tuple[float, float], ...],
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Returns the image with the finding, and centre x, y and radii x, y in body coordinates."""
    kind = finding.kind
    if kind == "Effusion":
        side = -1 if finding.side == "Left" else 1
        image, (x0, y0, x1, y1) = _effusion(rng, b, image, mask, side)
        return image, ((x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2)
    x, y = _place(rng, b, finding, box)
    low = MIN_RADIUS / b.scale  # the bound is for the image, the radius in body coordinates

    def blob(r: float, rough: float, edge: float) -> np.ndarray:
        return _blob(rng, b, x, y, r, rough, edge) * mask

    if kind == "Hemorrhage":
        r = low * rng.uniform(1.05, 1.5)
        image = _over(image, blob(r, 0.16, 0.04), rng.uniform(0.84, 0.95))
    elif kind == "Infarct":
        r = low * rng.uniform(1.25, 1.65)
        image = _over(image, blob(r, 0.2, 0.1) * 0.95, rng.uniform(0.1, 0.16))
    elif kind == "Nodule":
        r = low * rng.uniform(1.05, 1.25)
        image = _over(image, blob(r, 0.04, 0.04), rng.uniform(0.78, 0.92))
    elif kind == "Opacity":  # patchy, without an edge
        r = low * rng.uniform(1.7, 2.2)
        patchy = np.clip(0.85 + 0.25 * _texture(rng, 14), 0, 1)
        image = _over(image, blob(r, 0.2, 0.3) * patchy, rng.uniform(0.56, 0.66))
    elif kind == "Cyst":
        r = low * rng.uniform(1.05, 1.5)
        image = _over(image, blob(r, 0.03, 0.03), rng.uniform(0.08, 0.14))
    elif kind == "Stone":
        r = low * rng.uniform(1.02, 1.2)
        image = _over(image, blob(r, 0.1, 0.02), rng.uniform(0.95, 1.0))
    elif kind == "Mass":  # a bright rim around a darker core
        r = low * rng.uniform(1.3, 1.7)
        image = _over(image, blob(r, 0.1, 0.04), rng.uniform(0.78, 0.9))
        core = _blob(rng, b, x, y, r * rng.uniform(0.5, 0.6), 0.15, 0.05) * mask
        image = _over(image, core, rng.uniform(0.1, 0.2))
    else:
        raise ValueError(f"unknown finding {kind!r}; known: {FINDINGS}")
    return image, (x, y, r, r)


def _expose(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Exposure, uneven field, noise: float image about 0..1 -> uint8."""
    image = np.clip(image, 0, 1) ** rng.uniform(0.85, 1.2)
    image = image * (1 + 0.05 * _texture(rng, 3)) * rng.uniform(0.82, 1.0) + rng.uniform(0, 0.06)
    grain = rng.normal(size=image.shape) + 0.5 * _texture(rng, 48)
    image = image + rng.uniform(0.012, 0.04) * grain
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def draw(
    rng: np.random.Generator, region: str, modality: str, finding: Finding | None
) -> tuple[np.ndarray, list[dict[str, list[float]]]]:
    """Draws one image.

    Args:
      rng: the only source of randomness: the same state gives the same image.
      region: "Head", "Chest" or "Abdomen".
      modality: one of `MODALITIES[region]`.
      finding: what to draw into it; None for a normal image.

    Returns:
      (uint8[SIZE, SIZE] grey image, boxes as in SLAKE's detection.json: one-key dicts of
      [x, y, width, height] in pixels; the finding comes last).

    Raises:
      ValueError: a modality or finding that the region doesn't have.
    """
    if modality not in MODALITIES[region]:
        raise ValueError(f"{region} has no {modality!r}; expected one of {MODALITIES[region]}")
    if finding is not None and finding.kind not in FINDINGS[region]:
        raise ValueError(f"{region} has no {finding.kind!r}; expected one of {FINDINGS[region]}")
    b = _body(rng)
    image, mask, placed, box = _ANATOMY[region](rng, b, modality)
    if finding is not None:
        image, where = _add_finding(rng, b, image, mask, finding, box)
        placed = [*placed, (finding.kind, *where)]
    boxes = []
    for label, cx, cy, rx, ry in placed:
        ix, iy = b.to_image(cx, cy)
        corners = np.array([ix - rx * b.scale, iy - ry * b.scale, ix + rx * b.scale, iy + ry * b.scale])
        x0, y0, x1, y1 = np.round(np.clip((corners + 1) * SIZE / 2, 0, SIZE)).tolist()
        boxes.append({label: [x0, y0, x1 - x0, y1 - y0]})
    return _expose(rng, image), boxes
