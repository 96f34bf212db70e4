"""Failure flags: which answers an auditor should look at first, and why, from numbers alone.

Each flag is a function with a threshold of its own, explained in its docstring. A raised flag is a
reason to look, not a proof of failure; the absence of flags proves nothing either.

Axis letters: L layers, N heads, R response tokens, h × w patches.
"""

import math
import re
from typing import NamedTuple

import numpy as np
from scipy import ndimage

ONE_BIT = math.log(2)  # in nats


class Flag(NamedTuple):
    """One check of one answer.

    Attributes:
      name: which check.
      raised: whether it failed.
      value: the measured number.
      threshold: what the value was compared with.
      severity: 0 if not raised, up to 1; for sorting, only roughly comparable between checks.
      says: the finding in a sentence.
    """

    name: str
    raised: bool
    value: float
    threshold: float
    severity: float
    says: str


def _flag(name, raised, value, threshold, excess, says):
    severity = float(np.clip(excess, 0.01, 1.0)) if raised else 0.0
    return Flag(name, bool(raised), float(value), float(threshold), severity, says)


# --- Was the model asked what the page says? ---


def prompt_cut(tokens) -> Flag:
    """Did the prompt lose its last `tokens` tokens? Then another question was answered."""
    says = f"The question was too long: the last {tokens} tokens of the prompt were cut off."
    return _flag("question_cut", tokens > 0, tokens, 0, 1, says)


# --- Does the answer depend on the image? ---


def shuffled(image, patch, seed=0) -> np.ndarray:
    """float32[h, w, 3]: the image with its patches of `patch` px (an int or a pair) in random places.

    It has the image's grey values, but no anatomy larger than a patch.

    Raises:
      ValueError: the patches don't tile the image.
    """
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    height, width, channels = image.shape
    if height % ph or width % pw:
        raise ValueError(f"patches of {ph}×{pw} px don't tile an image of {height}×{width} px.")
    grid = (height // ph, ph, width // pw, pw, channels)
    patches = image.reshape(grid).swapaxes(1, 2).reshape(-1, ph, pw, channels)
    patches = np.random.default_rng(seed).permutation(patches)
    return patches.reshape(grid[0], grid[2], ph, pw, channels).swapaxes(1, 2).reshape(image.shape)


def image_ignored(logprobs, controls, threshold=ONE_BIT) -> Flag:
    """Is the answer as probable without the image?

    The answer's log-probability is compared with that of the same tokens on other images: blank and
    shuffled. Raised if each of them costs the answer less than ln 2 nats. Why ln 2: it is one bit, a
    halving of the probability. An answer that keeps more than half of it wasn't read off the image,
    though it may be right: much can be known from the question. Why *each*: one alone says less. A
    blank image looks like something to a model (slake_mini takes it for a film), and shuffled patches
    keep grey values and texture, which suffice for many questions: of 120 answers of slake_mini, 97 %
    keep half of their probability on shuffled patches, 63 % on a blank image, and 63 % on both.

    Args:
      logprobs: float[R] of the answer's tokens, given the image.
      controls: {name: float[R]}, the same tokens' log-probabilities given another image.
    """
    drops = {name: float(np.sum(logprobs) - np.sum(other)) for name, other in controls.items()}
    if not drops:
        raise ValueError("image_ignored needs the answer's log-probabilities on another image.")
    drop = max(drops.values())
    raised = drop < threshold
    kept = (f"{min(np.exp(-d), 9.99):.0%} as probable with a {n} image" for n, d in drops.items())
    says = f"The answer is {', '.join(kept)}" + (": it hardly depends on the image." if raised else ".")
    return _flag("image_ignored", raised, drop, threshold, 1 - drop / threshold, says)


def low_image_mass(mass, threshold=0.1) -> Flag:
    """Do the response's tokens attend to the image in any layer?

    The value is the share of attention that goes from the response's queries to image patches, mean
    over heads and tokens, in the layer where it is largest. Why a tenth: patches are at least four
    fifths of the positions, so a query without a preference gives them 0.8 or more; even when much of
    it rests on the first token, as in most language models, a layer that reads the image is above 0.1
    (slake_mini: 0.18 and more on 64 questions of SLAKE). The image can still act through the prompt's
    tokens, which attend to it too: hence only a flag.

    Args:
      mass: float[L, N, R, 3], shares of image, prompt and response.
    """
    layers = np.asarray(mass, np.float64)[..., 0].mean(axis=(1, 2))
    at = int(layers.argmax())
    value = layers[at]
    says = f"At most {value:.0%} of the response's attention goes to the image (layer {at + 1})."
    return _flag("low_image_mass", value < threshold, value, threshold, 1 - value / threshold, says)


# --- Does the model stand by its answer? ---


def samples_disagree(answer, samples, threshold=0.5) -> Flag:
    """Do sampled answers say something other than the answer shown?

    The value is the share of samples that equal the answer apart from case, punctuation and blanks.
    Raised at half or less, when the model itself gives the answer no better than even odds. (Of five
    samples, at most two agree. A paraphrase counts as another answer.)

    Args:
      answer: str, the greedy one.
      samples: list of str, drawn at temperature 1.
    """
    if not samples:
        raise ValueError("samples_disagree needs sampled answers.")
    same = sum(_words(s) == _words(answer) for s in samples)
    share = same / len(samples)
    says = f"{same} of {len(samples)} sampled answers say the same."
    return _flag("samples_disagree", share <= threshold, share, threshold, 1 - share / (2 * threshold), says)


def _words(text):
    return re.findall(r"\w+", text.casefold())


# --- Does the map lie on the patient? ---


def body(image, level=0.1) -> np.ndarray:
    """bool[height, width], True on the patient: whatever is brighter than the background.

    Brighter means above `level` of the way from the darkest grey to the 99th percentile (the first
    tenth holds noise and the air of a CT, but no tissue on a film). The mask is closed and opened by
    1/64 of the shorter side, so that soft edges hold together and text and tables fall off; holes
    (lungs, bowel) are filled and the largest component is kept. Needs a dark background: invert a
    MONOCHROME1 film first.

    Args:
      image: float or uint8 [height, width] or [height, width, channels].
    """
    grey = np.asarray(image, np.float64)
    grey = grey.mean(-1) if grey.ndim == 3 else grey
    dark, bright = grey.min(), np.percentile(grey, 99)
    mask = grey > dark + level * (bright - dark)
    radius = max(1, min(mask.shape) // 64)
    # Padded with its edge values, or closing and opening would erode what touches the image's edge.
    mask = np.pad(mask, radius + 1, mode="edge")
    mask = ndimage.binary_fill_holes(ndimage.binary_closing(mask, iterations=radius))
    mask = ndimage.binary_opening(mask, iterations=radius)
    mask = mask[radius + 1 : -radius - 1, radius + 1 : -radius - 1]
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    if not sizes.any():
        return np.zeros(mask.shape, bool)
    return ndimage.binary_fill_holes(labels == sizes.argmax())


def outside_body(saliency, image, least=0.05, name="map") -> Flag:
    """Does the map point beside the patient?

    The value is the share of the map's (positive) sum outside the body; a patch across the body's edge
    counts in proportion. The threshold is the share of the image outside the body, which is what a
    constant map scores: a map above it prefers the background. That can be a habit of transformers,
    which keep notes in empty patches (arXiv 2309.16588), or of a model that reads burnt-in labels. (Of
    179 relevancy maps of slake_mini on SLAKE, 17 % are above it; of the same values in random places,
    56 %.) If less than `least` of the image is outside, there is hardly an outside to point at, and
    the flag isn't raised.

    Args:
      saliency: float[h, w], the map.
      image: float or uint8 [height, width(, channels)], h and w dividing its sides.
      name: the map's name, for the sentence.

    Raises:
      ValueError: the map's grid doesn't divide the image.
    """
    inside = body(image)
    (h, w), (height, width) = np.shape(saliency), inside.shape
    if height % h or width % w:
        raise ValueError(f"a map of {h}×{w} doesn't divide an image of {height}×{width} px.")
    outside = 1 - inside.reshape(h, height // h, w, width // w).mean(axis=(1, 3))
    positive = np.maximum(np.asarray(saliency, np.float64), 0)
    value = float((positive * outside).sum() / max(positive.sum(), 1e-30))
    area = float(outside.mean())
    # So that rounding alone doesn't raise it for a constant map.
    raised = least <= area < 1 and value > area + 1e-6
    says = f"{value:.0%} of the {name} lies outside the body, which is {area:.0%} of the image."
    excess = (value - area) / max(1 - area, 1e-6)
    return _flag("outside_body", raised, value, area, excess, says)


# --- For an index page ---


def severity(flags) -> tuple[int, float]:
    """(number of raised flags, sum of their severities): the larger, the more urgent."""
    return sum(f.raised for f in flags), sum(f.severity for f in flags)


def worst_first(answers) -> list[int]:
    """Indices of answers (each a list of flags), the highest `severity` first; ties keep their order."""
    found = [severity(flags) for flags in answers]
    return sorted(range(len(found)), key=lambda i: found[i], reverse=True)
