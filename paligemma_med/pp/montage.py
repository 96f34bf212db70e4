"""Several pictures → one, since the models look at one image a question: side by side in rows, as films on a light box.

Nothing is turned or mirrored: what is left in a picture is left in its place.
"""

import io
import math
from collections.abc import Iterable

import numpy as np
from PIL import Image

from paligemma_med.pp import images, ops_image

MAX_CELLS = 64
MAX_SIDE = 4096  # pixels of the whole: models look at 224 to 896


def grid(count: int) -> tuple[int, int]:
    """(rows, columns) for so many pictures: as many columns as rows, or one more."""
    columns = math.isqrt(count - 1) + 1
    return -(-count // columns), columns


def sampled(total: int, count: int) -> list[int]:
    """`count` of `total` numbers from 0, at equal distances: the middle of each of `count` equal parts. All, if
    there are fewer."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def draw(pictures: Iterable[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """uint8[H, W, 3] with pictures uint8[h, w, 3] in rows from the top left, each as large as its place allows.

    All places are of one size, that of the largest height and width, shrunk where the whole would be larger than
    `MAX_SIDE`; a picture of another shape keeps its shape and is centred on black. Places without a picture are black.
    """
    limit = MAX_SIDE // max(rows, columns)
    shrunk = [_fitted(x, limit, limit) if max(x.shape[:2]) > limit else x for x in pictures]  # one by one: memory
    if len(shrunk) > rows * columns:
        raise images.ImageError(f"{len(shrunk)} pictures in {rows} x {columns} places")
    height, width = (max(x.shape[axis] for x in shrunk) for axis in (0, 1))
    out = np.zeros((rows, height, columns, width, 3), np.uint8)
    for i, picture in enumerate(shrunk):
        picture = _fitted(picture, height, width)
        h, w = picture.shape[:2]
        top, left = (height - h) // 2, (width - w) // 2
        out[i // columns, top : top + h, i % columns, left : left + w] = picture
    return out.reshape(rows * height, columns * width, 3)


def encode(rgb: np.ndarray) -> bytes:
    """PNG of uint8[H, W, 3]; of one channel if it is grey, which readers repeat."""
    grey = (rgb == rgb[..., :1]).all()
    out = io.BytesIO()
    Image.fromarray(rgb[..., 0] if grey else rgb).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _fitted(picture, height, width):
    """A picture of the same shape that just fits."""
    scale = min(height / picture.shape[0], width / picture.shape[1])
    h, w = (max(1, min(round(n * scale), most)) for n, most in zip(picture.shape, (height, width)))
    return ops_image.resize_image(picture, h, w, antialias=True)
