"""Images as they are sent to a server: the file's own bytes where any program reads them alike, else a PNG."""

import base64
import io

import numpy as np
from PIL import Image

from paligemma_med.evaluation import controls
from paligemma_med.pp import images

GREY = 128


def own(content: bytes) -> tuple[bytes, np.ndarray]:
    """(bytes to send, uint8[height, width, 3]) of a stored image."""
    found = images.decode(content)
    return (content if found.plain else png(found.rgb)), found.rgb


def of_row(source, index: int) -> tuple[bytes, np.ndarray]:
    """`own` of row `index` of a data source. ValueError names the question whose image can't be read."""
    row = source[index]
    try:
        return own(row["image"])
    except images.ImageError as e:
        raise ValueError(f"{source}, question {row['question_id']!r}: {e}") from e


def png(rgb: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    return out.getvalue()


def blank(size: tuple[int, int]) -> bytes:
    """Mid-grey of (height, width)."""
    return png(np.full((*size, 3), GREY, np.uint8))


def noise(size: tuple[int, int], key: str, seed: int) -> bytes:
    """`controls.noise_image` in 256 steps."""
    return png(((controls.noise_image((*size, 3), key, seed) + 1) * 128).astype(np.uint8))


def resized(rgb: np.ndarray, size: tuple[int, int]) -> bytes:
    """Another image, brought to (height, width), so that its shape doesn't tell which question it belongs to."""
    return png(np.asarray(Image.fromarray(rgb).resize(size[::-1], Image.Resampling.BICUBIC)))


def data_url(content: bytes) -> str:
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
