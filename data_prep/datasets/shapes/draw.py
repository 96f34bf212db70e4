"""Draws pictures of up to two simple shapes on a background, in colour or in grey.

Nothing medical: the tiny base model is pre-trained on these. It should learn to look, to find a thing in
a picture, and to name what and where it is. So each shape has a quadrant of the picture to itself and
differs clearly from the background, while size, place, rotation, sharpness, background and noise vary.
Half of the grey pictures have a structured background that is mirrored left and right ("Plates"), in
which a shape breaks the symmetry.

"left" and "right" are sides of the picture as the viewer sees it.
"""

import dataclasses

import numpy as np
import PIL.Image

SIZE = 64
SHAPES = ("Circle", "Square", "Triangle", "Ring", "Cross", "Star", "Cloud")
COLOURS = {
    "Red": (0.9, 0.1, 0.1),
    "Green": (0.1, 0.75, 0.15),
    "Blue": (0.15, 0.25, 0.95),
    "Yellow": (0.95, 0.9, 0.1),
    "White": (1.0, 1.0, 1.0),
    "Black": (0.0, 0.0, 0.0),
}
TONES = ("Brighter", "Darker")
SIZES = ("Large", "Small")
BACKGROUNDS = ("Plain", "Stripes", "Checks", "Dots", "Plates")
MAX_SHAPES = 2
# Half widths of the picture. A shape's centre keeps MARGIN from both middle lines.
MARGIN = 0.14
RADII = {"Large": (0.3, 0.38), "Small": (0.16, 0.23)}


@dataclasses.dataclass(frozen=True)
class Item:
    """A shape of a picture.

    shape: one of SHAPES; side: "Left" or "Right"; level: "Upper" or "Lower"; size: one of SIZES;
    paint: a colour of COLOURS in a coloured picture, one of TONES in a grey one.
    """

    shape: str
    side: str
    level: str
    size: str
    paint: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a picture: `background` is one of BACKGROUNDS, with at most one item per quadrant."""

    grey: bool
    background: str
    items: tuple[Item, ...]


def random_scene(rng: np.random.Generator) -> Scene:
    """Any scene: a third with one shape (rarely none) on a plain ground, two fifths with plates."""
    kind = rng.choice(["easy", "plates", "other"], p=[0.35, 0.4, 0.25])
    if kind == "easy":
        return easy_scene(rng)
    if kind == "plates":
        return _scene(rng, True, "Plates", [0.2, 0.7, 0.1])
    return _scene(rng, bool(rng.random() < 0.8), str(rng.choice(BACKGROUNDS[:4])), [0.1, 0.5, 0.4])


def easy_scene(rng: np.random.Generator) -> Scene:
    """One shape (rarely none) on a plain ground, for a model that can't look yet."""
    return _scene(rng, bool(rng.random() < 0.8), "Plain", [0.05, 0.95, 0])


def _scene(rng, grey, background, shares) -> Scene:
    """A scene; shares are the probabilities of no shape, one, two."""
    items = []
    for quadrant in rng.permutation(4)[: rng.choice(MAX_SHAPES + 1, p=shares)].tolist():
        items.append(
            Item(
                shape=str(rng.choice(SHAPES)),
                side="Right" if quadrant & 1 else "Left",
                level="Lower" if quadrant & 2 else "Upper",
                size=str(rng.choice(SIZES)),
                paint=str(rng.choice(TONES if grey else list(COLOURS))),
            )
        )
    return Scene(grey, background, tuple(items))


_LINE = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
_X, _Y = np.meshgrid(_LINE, _LINE)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of about unit height, with `cells` bumps across the picture."""
    small = rng.normal(size=(cells, cells)).astype(np.float32)
    large = PIL.Image.fromarray(small).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
    return np.asarray(large)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Roughly how far inside a shape of radius 1 a point is; negative outside."""
    if shape in ("Circle", "Cloud"):
        return 1 - np.hypot(x, y)
    if shape == "Ring":
        return 0.27 - np.abs(np.hypot(x, y) - 0.73)
    if shape == "Square":
        return 0.8 - np.maximum(np.abs(x), np.abs(y))
    if shape == "Triangle":
        slope = np.sqrt(3) / 2
        return 0.5 - np.maximum(y, np.maximum(slope * x - y / 2, -slope * x - y / 2))
    if shape == "Cross":
        across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
        return np.minimum(0.28 - across, 1 - along)
    if shape == "Star":
        angle = (np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
        radius = np.hypot(x, y)
        u, v = radius * np.cos(angle), np.abs(radius * np.sin(angle))
        # The line from a tip (1, 0) to the notch beside it.
        notch = 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        normal = np.array([notch[1], 1 - notch[0]])
        return (normal[0] * (1 - u) - normal[1] * v) / np.hypot(*normal)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _background(rng: np.random.Generator, kind: str) -> np.ndarray:
    """float[SIZE, SIZE] around a middle grey."""
    if kind == "Plates":
        return _plates(rng)
    base = rng.uniform(0.35, 0.6)
    image = np.full((SIZE, SIZE), base, np.float32)
    turn = rng.uniform(0, np.pi)
    u, v = np.cos(turn) * _X + np.sin(turn) * _Y, np.cos(turn) * _Y - np.sin(turn) * _X
    depth = rng.uniform(0.04, 0.07) * rng.choice([-1, 1])
    per = rng.uniform(2.2, 4.5) * np.pi
    phase = rng.uniform(0, 2 * np.pi, 2)
    if kind == "Stripes":
        image += depth * np.tanh(3 * np.sin(per * u + phase[0]))
    elif kind == "Checks":
        image += depth * np.tanh(6 * np.sin(per * u + phase[0]) * np.sin(per * v + phase[1]))
    elif kind == "Dots":
        waves = np.cos(per * u + phase[0]) + np.cos(per * v + phase[1])
        image += 1.4 * depth * np.clip(2 * (waves - 0.7), 0, 1)
    elif kind != "Plain":
        raise ValueError(f"unknown background {kind!r}; known: {', '.join(BACKGROUNDS)}")
    return image + 0.03 * _noise(rng, 3)


def _soft(distance: np.ndarray, edge: float) -> np.ndarray:
    """1 where `distance` is positive, 0 where it is negative, with a transition about `edge` wide."""
    return 1 / (1 + np.exp(np.clip(-4 * distance / edge, -30, 30)))


def _plate(x, y, radii, turn, edge, power=2.0):
    """A diamond (power 1), an oval (2) or nearly a box (6)."""
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    from_centre = (np.abs(u / radii[0]) ** power + np.abs(v / radii[1]) ** power) ** (1 / power)
    return _soft((1 - from_centre) * min(radii), edge)


def _plates(rng: np.random.Generator) -> np.ndarray:
    """float[SIZE, SIZE]: plates on plates, bars and pairs of plates, mirrored at an upright axis.

    The axis is slightly tilted and off the middle, and both halves have a smooth texture.
    """
    lean, off = rng.uniform(-0.12, 0.12), rng.uniform(-0.05, 0.05, 2)
    x, y = _X - off[0], _Y - off[1]
    x, y = np.cos(lean) * x + np.sin(lean) * y, np.cos(lean) * y - np.sin(lean) * x
    across = np.abs(x)  # the mirror
    image = np.full((SIZE, SIZE), rng.uniform(0, 0.3), np.float32)
    radii, power = rng.uniform(0.65, 1.25, 2), rng.choice([1.0, 1.4, 2.0, 3.0, 6.0])
    for _ in range(rng.integers(1, 4)):
        plate = _plate(x, y, radii, 0, rng.choice([0.03, 0.08]), power)
        image += plate * (rng.uniform(0.1, 0.8) - image)
        radii = radii - rng.uniform(0.03, 0.14)
    image += _plate(x, y, radii, 0, 0.05, power) * (rng.uniform(0.25, 0.65) - image)
    if rng.random() < 0.3:
        bars = np.sin(rng.uniform(8, 14) * (y + rng.uniform(-1, 1) * across) + rng.uniform(0, 6))
        image += 0.1 * np.clip(bars, 0, 1)
    for _ in range(rng.integers(0, 5)):  # pairs, mostly thin, unlike any shape
        long, thin = rng.uniform(0.12, 0.6), rng.uniform(0.03, 0.12)
        if rng.random() < 0.25:
            long, thin = rng.uniform(0.3, 0.6), rng.uniform(0.2, 0.35)
        place, turn = (rng.uniform(0.05, 0.7), rng.uniform(-0.7, 0.7)), rng.uniform(0, np.pi)
        edge = rng.uniform(0.03, 0.1)
        pair = _plate(across - place[0], y - place[1], (long, thin), turn, edge, power)
        image += pair * rng.uniform(0.5, 1) * (rng.uniform(0.05, 0.9) - image)
    if rng.random() < 0.4:  # in the middle
        place, radii = rng.uniform(-0.7, 0.7), rng.uniform(0.04, 0.25, 2)
        image += _plate(x, y - place, radii, 0, 0.05, power) * (rng.uniform(0.05, 0.95) - image)
    return np.clip(image + 0.03 * _noise(rng, 3) + 0.03 * _noise(rng, 16), 0, 1)


def _radius(rng: np.random.Generator, size: str) -> float:
    return rng.uniform(*RADII[size])


def _tone(rng, behind, mask, item, scene) -> float:
    """A grey that is clearly brighter or darker than what lies behind, as the item's tone says."""
    sign = 1 if item.paint == "Brighter" else -1
    if scene.background != "Plates":
        return np.clip(behind.mean() + sign * rng.uniform(0.26, 0.42), 0, 1)
    around = (behind * mask).sum() / mask.sum()
    end = 1.0 if sign > 0 else 0.0
    # Plates may be so bright or dark that little range is left; then all of it is used.
    far = max(rng.uniform(0.5, 0.9) * abs(end - around), min(0.25, abs(end - around)))
    return around + sign * far


def draw(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, list[dict[str, list[float]]]]:
    """Draws a picture.

    Args:
      rng: the only source of randomness: the same state gives the same picture.
      scene: what is in it.

    Returns:
      (uint8[SIZE, SIZE, 3], boxes as in SLAKE's detection.json: one-key dicts of
      [x, y, width, height] in pixels, one for each item).

    Raises:
      ValueError: an unknown word in the scene.
    """
    behind = _background(rng, scene.background)
    tint = np.ones(3) if scene.grey else rng.uniform(0.85, 1.15, 3)
    image = behind[..., None] * tint
    boxes = []
    for item in scene.items:
        r = _radius(rng, item.size)
        sx = -1 if item.side == "Left" else 1
        sy = -1 if item.level == "Upper" else 1
        # Large shapes stay inside the picture and cross the middle lines only a little.
        low, high = max(MARGIN, r - 0.12), min(0.8, 0.97 - r)
        x, y = sx * rng.uniform(low, high), sy * rng.uniform(low, high)
        turn = rng.uniform(-0.3, 0.3)
        u = (np.cos(turn) * (_X - x) + np.sin(turn) * (_Y - y)) / r
        v = (np.cos(turn) * (_Y - y) - np.sin(turn) * (_X - x)) / r
        mask = _soft(r * _distance(item.shape, u, v), rng.choice([0.03, 0.1]))
        if item.shape == "Cloud":  # a wavy outline, hardly an edge, and uneven within
            outline = 1 + 0.1 * np.cos(np.arctan2(v, u) * rng.integers(2, 5) + rng.uniform(0, 6.3))
            mask = _soft(r * (outline - np.hypot(u, v)), rng.uniform(0.2, 0.35))
            mask = mask * np.clip(0.85 + 0.2 * _noise(rng, 14), 0, 1)
        if scene.grey:
            if item.paint not in TONES:
                raise ValueError(f"a grey picture has no {item.paint!r}; known: {TONES}")
            value = np.repeat(_tone(rng, behind, mask, item, scene), 3)
        else:
            if item.paint not in COLOURS:
                raise ValueError(f"unknown colour {item.paint!r}; known: {', '.join(COLOURS)}")
            value = np.clip(np.array(COLOURS[item.paint]) + rng.uniform(-0.06, 0.06, 3), 0, 1)
        image = image + mask[..., None] * (value - image)
        box = [x - r, y - r, x + r, y + r]
        x0, y0, x1, y1 = np.round(np.clip((np.array(box) + 1) * SIZE / 2, 0, SIZE)).tolist()
        boxes.append({item.shape: [x0, y0, x1 - x0, y1 - y0]})
    grain = rng.normal(size=(SIZE, SIZE, 1)) * rng.uniform(0.005, 0.025)
    image = image * rng.uniform(0.85, 1.0) + grain
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8), boxes
