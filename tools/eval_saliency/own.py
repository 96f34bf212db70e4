"""The model's own boxes: what it answers to "detect liver", so that its maps can be compared with what it says."""

from paligemma_med.pp import boxes as boxes_lib

_TOKENS = 64  # as the evaluation of boxes has


def own_boxes(subject, image, labels, size) -> list[list[float]]:
    """The boxes that the model gives for labels, each asked for by itself.

    Args:
      subject: `measure.Subject`, of a model that was trained on boxes.
      image: encoded bytes.
      labels: names, in lower case.
      size: (height, width) of the image.

    Returns:
      [[x, y, width, height], …] in pixels; [] unless the model gives at least one box of each name, and nothing that is
      malformed.
    """
    found = []
    for label in labels:
        _, text = subject.ask(image, f"detect {label}", max_new_tokens=_TOKENS)
        said = boxes_lib.read(text)
        named = [box for box, name in zip(said.boxes, said.labels) if name.lower() == label]
        if said.malformed or not named:
            return []
        found += [[x0 * size[1], y0 * size[0], (x1 - x0) * size[1], (y1 - y0) * size[0]] for y0, x0, y1, x1 in named]
    return found
