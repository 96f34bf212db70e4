"""Problems with weights, in one error that a user can act on."""

from collections.abc import Iterable

from paligemma_med.models.leaves import TreeError

# Weights that can't be read, or that don't fit the model; the message says which and why.
CheckpointError = TreeError

_MAX_LISTED = 20


def raise_all(problems: list[str], what: str, total: int) -> None:
    """Raises one CheckpointError that lists `problems`, one per line, if there are any.

    Args:
      what: the first words of the message.
      total: how many keys were checked.
    """
    if not problems:
        return
    shown = "\n  ".join(problems[:_MAX_LISTED])
    rest = len(problems) - _MAX_LISTED
    more = f"\n  … and {rest} more" if rest > 0 else ""
    raise CheckpointError(f"{what}: {len(problems)} of {total} keys differ\n  {shown}{more}")


def listed(items: Iterable) -> str:
    """ "a, b, c and 7 more"."""
    items = [str(i) for i in items]
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more


def first_line(error: Exception) -> str:
    """The first line of another library's message; of a long one two ends, since TensorStore's causes come last."""
    text = (str(error) or "no message").splitlines()[0].split(" [tensorstore_spec=")[0].rstrip(". ")
    return text if len(text) <= 400 else f"{text[:160]} … {text[-240:]}"
