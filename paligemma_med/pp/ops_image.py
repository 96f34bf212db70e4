"""Image ops: decode any file to RGB, resize as TensorFlow does, and gentle augmentations.

Names and arguments are those of big_vision's `pp/ops_image.py`. Images are numpy arrays [H, W, 3]
under the key `image` unless stated otherwise. Nothing flips: left and right are answers. `rotate` and
`noise` are ours.
"""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from paligemma_med.pp import dicom, images, windows
from paligemma_med.pp.registry import Op, get, need_rng, on_key, parse_call, register, resolve_keys, split


@register("decode")
@on_key()
def decode(channels=3, precise=True) -> Callable:
    """Decodes an encoded image (bytes) to uint8 [H, W, 3]; arrays are converted to the same form.

    Reads what `images.to_rgb` reads, DICOM included; see there for 16 bits, palettes, transparency and
    several frames.

    `precise` is accepted because big_vision has it: PIL's JPEG decoding is the precise one.

    Raises ValueError for bytes that aren't an image, are cut off, or hold too many pixels.
    """
    if channels != 3:
        raise ValueError(f"only channels=3 is supported, found {channels!r}")
    if precise not in (True, False):
        raise ValueError(f"precise must be True or False, found {precise!r}")

    def fn(image, rng):
        del rng
        if isinstance(image, np.ndarray) and image.dtype == object and image.ndim == 0:
            image = image.item()
        if isinstance(image, np.ndarray) and image.ndim:
            return images.array_to_rgb(image)
        if isinstance(image, (bytes, bytearray, memoryview)):
            return images.to_rgb(bytes(image))
        raise ValueError(f"expected encoded bytes or a uint8 array, found {type(image).__name__}: {image!r:.80}")

    return fn


@register("window", before="decode")
@on_key()
def window(window, width=None) -> Callable:
    """Decodes encoded DICOM with a window in place of its own; comes before `decode`, which leaves the result as it is.

    `window("brain")`: a preset in Hounsfield units (`windows.PRESETS`), for CT alone; `window(40, 80)`: centre and
    width in the file's own units. Other images, whose grey values mean nothing any more, and arrays go on to `decode`
    unchanged, and DICOM that has no such units keeps its own window, of which a warning tells.
    """
    chosen = _chosen(window, width)

    def fn(image, rng):
        del rng
        if isinstance(image, np.ndarray) and image.dtype == object and image.ndim == 0:
            image = image.item()
        if not isinstance(image, (bytes, bytearray, memoryview)) or not dicom.is_dicom(bytes(image[:132])):
            return image
        return images.to_rgb(bytes(image), window=chosen)

    return fn


def _chosen(window, width=None):
    chosen = windows.parse(window if width is None else (window, width))
    if chosen is None:
        raise ValueError("expected a window's name, or its centre and width")
    return chosen


def window_of(pp: str) -> windows.Window | None:
    """The window that a pp string shows DICOM by, for who decodes an image before the pp does; None: the file's own."""
    for name, args, kw in map(parse_call, split(pp)):
        if name == "window" and not kw.keys() - {"window", "width"}:
            return _chosen(*args, **kw)
    return None


METHODS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@register("resize")
@on_key()
def resize(size, method="bilinear", antialias=False) -> Callable:
    """Resizes to `size`, an int for a square or (height, width); keeps the dtype.

    Equals `tf.image.resize(method=method, antialias=antialias)` followed by big_vision's cast back
    to the input's dtype, which truncates for uint8. Use `antialias=True`: without it, shrinking skips
    pixels. The default is False only because big_vision's is. `method` is "bilinear", or "bicubic", with
    which CLIP's towers were trained.
    """
    height, width = _two_sizes(size)
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, found {method!r}")

    def fn(image, rng):
        del rng
        return resize_image(image, height, width, antialias=antialias, method=method)

    return fn


def _two_sizes(size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"size must be a positive int or a pair of them, found {size!r}")
    return tuple(pair)


def _check_image(image) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or 0 in image.shape or image.dtype.kind not in "uif":
        raise ValueError(
            f"expected an image array [H, W, C], found {image.dtype} {list(image.shape)}; decode comes first"
        )
    return image


def resize_image(
    image: np.ndarray, height: int, width: int, *, antialias: bool, method: str = "bilinear"
) -> np.ndarray:
    """Resizes [H, W, C] to [height, width, C] of the same dtype.

    Pixel centres sit at half integers. Each output pixel is a weighted mean of input pixels under
    a triangle of half-width 1 ("bilinear") or Keys' cubic of half-width 2 ("bicubic", a = -0.5), widened by the
    scale when shrinking with `antialias`. The two axes are independent, so this is one small matrix product per axis.

    uint8 with antialias, which is what every config does to every image, is left to PIL: the same
    filter in integers, rounded after each axis (within 1 of the exact value, and within 2 of what TF
    computes and big_vision truncates), several times faster, and without BLAS threads that compete
    with the training step for cores.
    """
    image = _check_image(image)
    if image.shape[:2] == (height, width):
        return image
    h, w, c = image.shape
    if antialias and image.dtype == np.uint8 and c in (1, 3):
        pil = Image.fromarray(image[..., 0] if c == 1 else image)
        out = np.array(pil.resize((width, height), METHODS[method]))
        return out.reshape(height, width, c)
    rows, cols = _weights(h, height, antialias, method), _weights(w, width, antialias, method)
    out = np.asarray(image, np.float32)

    def resize_rows(x):
        return (rows @ x.reshape(h, -1)).reshape(height, -1, c)

    def resize_cols(x):
        return np.matmul(cols, x)

    # The axis that shrinks the most goes first: the second product is smaller then.
    if height * w <= width * h:
        out = resize_cols(resize_rows(out))
    else:
        out = resize_rows(resize_cols(out))
    if image.dtype.kind == "f":
        return out.astype(image.dtype)
    # Truncation, as in big_vision's cast; the small addition keeps 200 from becoming 199 where
    # float32 made it 199.99999.
    info = np.iinfo(image.dtype)
    return np.clip(np.floor(out + 1e-3), info.min, info.max).astype(image.dtype)


@functools.lru_cache(maxsize=256)
def _weights(size_in: int, size_out: int, antialias: bool, method: str) -> np.ndarray:
    """float32 [size_out, size_in]: how much each input pixel counts in each output pixel."""
    scale = size_in / size_out
    half_width = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(size_out) + 0.5) * scale
    distance = np.abs(np.arange(size_in) + 0.5 - centres[:, None]) / half_width
    if method == "bilinear":
        weights = np.maximum(0.0, 1.0 - distance)
    else:
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    weights.setflags(write=False)  # shared by all callers through the cache
    return weights


@register("inception_crop")
def inception_crop(
    size=None,
    area_min=5,
    area_max=100,
    aspect_min=0.75,
    aspect_max=1.33,
    method="bilinear",
    antialias=False,
    *,
    min_cover=0.5,
    key=None,
    inkey=None,
    outkey=None,
) -> Op:
    """Cuts out a random rectangle and, if `size` is given, resizes it. Needs an rng.

    Args:
      size: as for `resize`; None leaves the cut-out as it is.
      area_min, area_max: its area in percent of the image's, uniform.
      aspect_min, aspect_max: its width over its height, log-uniform (defaults: TF's).
      method, antialias: as for `resize`.
      min_cover: where the example has boxes (`objects`), they move with the image; a rectangle that leaves any of them
        less than this share of its area is drawn again.

    A rectangle that doesn't fit is drawn again, up to ten times; then the whole image is taken. A small
    area_min can cut away the finding that the question is about: 50 or more is safer than 5.
    """
    if not 0 < area_min <= area_max <= 100:
        raise ValueError(f"expected 0 < area_min <= area_max <= 100, found {area_min}, {area_max}")
    if not 0 < aspect_min <= aspect_max:
        raise ValueError(f"expected 0 < aspect_min <= aspect_max, found {aspect_min}, {aspect_max}")
    if not 0 < min_cover <= 1:
        raise ValueError(f"expected 0 < min_cover <= 1, found {min_cover}")
    source, target = resolve_keys(key, inkey, outkey, "image")
    to_size = None if size is None else resize(size, method, antialias, key="image")

    def op(data, rng):
        rng, image = need_rng(rng), _check_image(get(data, source))
        boxes = data["objects"]["bbox"] if "objects" in data else np.zeros((0, 4), np.float32)
        (y, x, h, w), boxes = _random_box(image.shape[0], image.shape[1], boxes, rng)
        image = image[y : y + h, x : x + w]
        data[target] = image if to_size is None else to_size({"image": image}, rng)["image"]
        if len(boxes):
            data["objects"] = data["objects"] | {"bbox": boxes}
        return data

    def _random_box(height, width, boxes, rng):
        for _ in range(10):
            area = height * width * rng.uniform(area_min, area_max) / 100
            aspect = np.exp(rng.uniform(np.log(aspect_min), np.log(aspect_max)))
            h, w = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
                moved, covers = _boxes_in(boxes, y / height, x / width, h / height, w / width)
                if (covers >= min_cover).all():
                    return (int(y), int(x), h, w), moved
        return (0, 0, height, width), boxes

    return op


def _boxes_in(boxes, y, x, h, w):
    """Boxes float32[n, 4] in shares of an image as shares of a part of it, and how much of the area of each is left."""
    low, size = np.array([y, x], np.float64), np.array([h, w], np.float64)
    corners = np.clip((boxes.reshape(-1, 2, 2) - low) / size, 0, 1)
    left = np.prod(np.diff(corners, axis=1)[:, 0] * size, axis=1)
    return corners.reshape(-1, 4).astype(np.float32), left / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def _shift(image: np.ndarray, change) -> np.ndarray:
    """Applies `change` to the float32 values 0..255 of an image, clips, restores the dtype."""
    image = _check_image(image)
    if image.dtype != np.uint8 and (image.dtype.kind != "f" or image.min() < 0):
        raise ValueError(
            f"expected values 0..255 (uint8 or float), found {image.dtype} with minimum"
            f" {image.min()}; this op comes before value_range"
        )
    out = np.clip(change(image.astype(np.float32)), 0, 255)
    return (np.rint(out) if image.dtype == np.uint8 else out).astype(image.dtype)


@register("brightness")
@on_key()
def brightness(max_delta) -> Callable:
    """Adds one random number in ±max_delta * 255 to the whole image. Needs an rng.

    For uint8 or float images of values 0..255, so before `value_range`; the result is clipped to
    0..255 and has the input's dtype.
    """
    if not 0 <= max_delta <= 1:
        raise ValueError(f"max_delta is a share of the full range, 0..1, found {max_delta}")

    def fn(image, rng):
        delta = np.float32(need_rng(rng).uniform(-max_delta, max_delta) * 255)
        return _shift(image, lambda x: x + delta)

    return fn


@register("contrast")
@on_key()
def contrast(lower, upper) -> Callable:
    """Scales each channel's distance from its mean by a random factor in [lower, upper).

    Needs an rng. For uint8 or float images of values 0..255, so before `value_range`; the result is
    clipped to 0..255 and has the input's dtype.
    """
    if not 0 <= lower <= upper:
        raise ValueError(f"expected 0 <= lower <= upper, found {lower}, {upper}")

    def fn(image, rng):
        factor = np.float32(need_rng(rng).uniform(lower, upper))

        def change(x):
            mean = x.mean(axis=(0, 1), keepdims=True)
            return (x - mean) * factor + mean

        return _shift(image, change)

    return fn


@register("rotate")
def rotate(max_degrees, *, key=None, inkey=None, outkey=None) -> Op:
    """Turns a uint8 image by a random angle in ±max_degrees about its middle; corners become black. Needs an rng.

    A few degrees are what patients lie differently; sides stay where they are. Boxes aren't moved, since a turned box
    is none, so that examples with boxes (`objects`) are refused.
    """
    if not 0 <= max_degrees <= 45:
        raise ValueError(f"max_degrees: expected 0 to 45, found {max_degrees}")
    source, target = resolve_keys(key, inkey, outkey, "image")

    def op(data, rng):
        image = _check_image(get(data, source))
        if image.dtype != np.uint8 or image.shape[2] != 3:
            raise ValueError(f"rotate: expected uint8 [H, W, 3], found {image.dtype} {list(image.shape)}")
        if len(data.get("objects", {}).get("bbox", ())):
            raise ValueError("rotate doesn't move boxes: leave it out of the pp of a data set with boxes")
        angle = need_rng(rng).uniform(-max_degrees, max_degrees)
        data[target] = np.array(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
        return data

    return op


@register("noise")
@on_key()
def noise(max_stddev) -> Callable:
    """Adds Gaussian noise, the same to all channels, of a random deviation in 0 to max_stddev * 255. Needs an rng.

    For uint8 or float images of values 0..255, so before `value_range`, and after a resize, which would smooth it; the
    result is clipped to 0..255 and has the input's dtype.
    """
    if not 0 <= max_stddev <= 1:
        raise ValueError(f"max_stddev is a share of the full range, 0..1, found {max_stddev}")

    def fn(image, rng):
        stddev = np.float32(need_rng(rng).uniform(0, max_stddev) * 255)
        return _shift(image, lambda x: x + stddev * rng.standard_normal((*x.shape[:2], 1), np.float32))

    return fn
