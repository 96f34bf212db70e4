"""Ops on boxes: from the pixels of a stored image to an answer in `<loc>` tokens.

    objects|decode|inception_crop(None, 60, 100)|resize(224)|…|loc_text(outkey="suffix")|tok(…, special="tokensets")

`objects` comes first, since a data set's boxes are in pixels of the image as it is stored. From then on boxes are
shares of the image: a resize leaves them as they are, and `inception_crop` moves them with what it cuts out. `boxes`
says what the text means.
"""

from collections.abc import Mapping

import numpy as np

from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import images, json_text
from paligemma_med.pp.ops_text import as_str
from paligemma_med.pp.registry import Op, get, register

OBJECTS = "objects"  # the key under which boxes in shares stand


@register("objects")
def objects(inkey="boxes", image="image") -> Op:
    """Turns boxes in pixels of the stored image, which is upright as `decode` makes it, into shares of it.

    Args:
        inkey: key of dict(label=[str, …], bbox=[[x, y, width, height], …]), or of a text, as a column of a table has
            it, in the form of SLAKE's detection.json: `[{"Liver": [x, y, width, height]}, …]`; "" is none.
        image: key of the encoded image.

    Gives data["objects"] = dict(label=[str, …], bbox=float32[n, 4]) with y0, x0, y1, x1 in 0 to 1, in order of y0 and
    x0. Parts outside of the image are cut off, and boxes wholly outside left out.
    """

    def op(data, rng):
        del rng
        encoded, found = get(data, image), get(data, inkey)
        if not isinstance(encoded, (bytes, bytearray, memoryview)):
            raise ValueError("objects comes before decode, since boxes are in pixels of the image as it is stored")
        if isinstance(found, str):
            found = _of_text(found, inkey)
        labels = [as_str(label, "each label") for label in _column(found, "label", inkey)]
        pixels = np.asarray(_column(found, "bbox", inkey), np.float64).reshape(-1, 4)
        if len(labels) != len(pixels) or not np.isfinite(pixels).all():
            raise ValueError(
                f"key {inkey!r} has {len(labels)} labels and the boxes {pixels.tolist()}; expected one each"
            )
        shares, which = boxes_lib.from_pixels(pixels, *images.size(bytes(encoded)))
        order = np.lexsort((shares[:, 1], shares[:, 0]))
        data[OBJECTS] = {"label": [labels[which[i]] for i in order], "bbox": shares[order]}
        return data

    return op


def _of_text(text, key):
    """dict(label, bbox) of a JSON list of objects with names and four numbers each."""
    expected = 'a list of {"name": [x, y, width, height]} in pixels'
    pairs = []
    for item in json_text.parse(text, f"key {key!r}", expected, root=list) if text.strip() else ():
        if not isinstance(item, dict):
            raise ValueError(f"key {key!r} has {json_text.shown(item)}; expected {expected}")
        pairs += item.items()
    for _, box in pairs:
        if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) for x in box):
            raise ValueError(f"key {key!r} has the box {json_text.shown(box)}; expected {expected}")
    return dict(label=[label for label, _ in pairs], bbox=[box for _, box in pairs])


def _column(found, name, key):
    if not isinstance(found, Mapping) or name not in found:
        raise ValueError(f"key {key!r} must hold label and bbox, found {found!r:.80}")
    return found[name]


@register("loc_text")
def loc_text(inkey="answer", outkey="suffix") -> Op:
    """The answer with boxes, made anew from `objects`, which a crop may have moved. An answer without boxes gets those
    of the row if the question begins with "detect ", which makes it boxes with names, or with "ground ".

    What the answer under `inkey` says before its first box stays in front; where that is nothing, each box is followed
    by its name, in lower case. Answers to other questions stay as they are.
    """

    def op(data, rng):
        del rng
        text = as_str(get(data, inkey), f"key {inkey!r}")
        said = boxes_lib.read(text)
        if said.boxes or said.malformed:
            text = _text(get(data, OBJECTS), said.answer)
        elif str(data.get("question", "")).startswith(TASKS) and len(get(data, OBJECTS)["bbox"]):
            text = _text(data[OBJECTS], "" if data["question"].startswith(TASKS[0]) else text)
        data[outkey] = text
        return data

    return op


def _text(found, answer):
    labels = () if answer else [label.lower() for label in found["label"]]
    return boxes_lib.to_text(found["bbox"], labels, answer)


TASKS = ("detect ", "ground ")


@register("task_prompt")
def task_prompt(template, inkey="question", outkey="prefix") -> Op:
    """A prompt for questions of several kinds: those that begin with "detect " or "ground " as they are, others in
    place of {question} in `template`."""
    if template.count("{question}") != 1:
        raise ValueError(f"template {template!r}: expected {{question}} in it, once")
    before, _, after = template.partition("{question}")

    def op(data, rng):
        del rng
        question = as_str(get(data, inkey), f"key {inkey!r}")
        data[outkey] = question if question.startswith(TASKS) else f"{before}{question}{after}"
        return data

    return op


@register("refcoco_mask2str")
def refcoco_mask2str(model="oi") -> Op:
    """big_vision's op for masks, refused."""
    raise ValueError(boxes_lib.MASKS)


@register("flip_lr")
def flip_lr(key="image", inkey=None, outkey=None) -> Op:
    """big_vision's random mirror, refused: a mirrored film is of a patient whose heart is on the right, and in the film
    stay letters that say which side is which. Swapping words in question and answer wouldn't mend that."""
    raise ValueError(
        "flip_lr mirrors images, but in radiology left and right are answers, and a mirrored image is of another "
        "anatomy: leave it out"
    )
