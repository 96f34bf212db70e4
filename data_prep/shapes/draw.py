"""Draws pictures of up to three simple shapes on a background, in colour or in grey.

Nothing medical: these are what the tiny base model is pre-trained on. What it should learn is to
look, to find a thing in a picture, and to name what and where it is. So each shape has a quadrant
of the picture to itself and differs clearly from what lies behind, while size, place, turn,
sharpness, background and noise vary.

"left" and "right" are sides of the picture as the viewer sees it.
"""

import dataclasses

import numpy as np
import PIL.Image

SIZE = 64
SHAPES = ("Circle", "Square", "Triangle", "Ring", "Cross", "Star")
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
BACKGROUNDS = ("Plain", "Stripes", "Checks", "Dots")
MAX_SHAPES = 3
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
    """What is in a picture: `background` one of BACKGROUNDS, at most one item in a quadrant."""

    grey: bool
    background: str
    items: tuple[Item, ...]


def random_scene(rng: np.random.Generator) -> Scene:
    """Any scene: a tenth without shapes, six with one, the rest with two or three."""
    grey = bool(rng.random() < 0.6)
    count = int(rng.choice(MAX_SHAPES + 1, p=[0.1, 0.6, 0.18, 0.12]))
    items = []
    for quadrant in rng.permutation(4)[:count].tolist():
        items.append(
            Item(
                shape=str(rng.choice(SHAPES)),
                side="Right" if quadrant & 1 else "Left",
                level="Lower" if quadrant & 2 else "Upper",
                size=str(rng.choice(SIZES)),
                paint=str(rng.choice(TONES if grey else list(COLOURS))),
            )
        )
    background = str(rng.choice(BACKGROUNDS, p=[0.55, 0.15, 0.15, 0.15]))
    return Scene(grey, background, tuple(items))


_LINE = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
_X, _Y = np.meshgrid(_LINE, _LINE)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of about unit height, with `cells` bumps across the picture."""
    small = rng.normal(size=(cells, cells)).astype(np.float32)
    large = PIL.Image.fromarray(small).resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC)
    return np.asarray(large)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Roughly how far inside of a shape of radius 1 a point is; negative outside."""
    if shape == "Circle":
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


def _radius(rng: np.random.Generator, size: str) -> float:
    return rng.uniform(*RADII[size])


def draw(rng: np.random.Generator, scene: Scene) -> tuple[np.ndarray, list[dict[str, list[float]]]]:
    """Draws a picture.

    Args:
      rng: all randomness comes from it: the same state gives the same picture.
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
        # Large shapes stay inside of the picture and cross the middle lines only a little.
        low, high = max(MARGIN, r - 0.12), min(0.8, 0.97 - r)
        x, y = sx * rng.uniform(low, high), sy * rng.uniform(low, high)
        turn = rng.uniform(-0.3, 0.3)
        u = (np.cos(turn) * (_X - x) + np.sin(turn) * (_Y - y)) / r
        v = (np.cos(turn) * (_Y - y) - np.sin(turn) * (_X - x)) / r
        edge = rng.choice([0.03, 0.1])
        mask = 1 / (1 + np.exp(np.clip(-4 * r * _distance(item.shape, u, v) / edge, -30, 30)))
        if scene.grey:
            if item.paint not in TONES:
                raise ValueError(f"a grey picture has no {item.paint!r}; known: {TONES}")
            step = rng.uniform(0.26, 0.42) * (1 if item.paint == "Brighter" else -1)
            value = np.repeat(np.clip(behind.mean() + step, 0, 1), 3)
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
