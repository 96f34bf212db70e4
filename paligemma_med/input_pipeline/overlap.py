"""Images that a run is trained on and measured on: told from the digests that builds write, in a moment.

By content alone: `python -m data_prep.leakage` finds re-encoded copies, too.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from paligemma_med.input_pipeline import sets, sources
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.pp import image_digests

FIRST = 5  # ids that are listed


def trained_on(input_cfg: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The data sections of `config.input`: one, or those of a mixture; [] where there is none."""
    if not input_cfg or "data" not in input_cfg:
        return []
    if not sets.is_mixture(input_cfg["data"]):
        return [dict(input_cfg["data"])]
    sections = [dict(input_cfg.get(name) or {}).get("data") for name in input_cfg["data"]]
    return [dict(data) for data in sections if data]


def shared_images(training: Iterable[Mapping[str, Any]], evaluated: Mapping[str, Any]) -> dict[str, Any]:
    """Which images of an evaluation set the training sets have.

    Args:
      training: data sections, of `trained_on`.
      evaluated: a data section.

    Returns:
      {"images": how many, "of": the evaluation split's, "in": {"NAME SPLIT": {"images": n, "first": image ids}}}, and
      "not_known": sets without digests (own tables, and those built before there were any), where there are such.
      {} where the evaluation set has none, or nothing can be said.

    Raises:
      ValueError: a file of digests is damaged.
    """
    wanted = _digests(evaluated)
    if not wanted:
        return {}
    found, places, unknown = set(), {}, []
    for data in training:
        name = f"{data.get('name')} {data.get('split')}"
        if (there := _digests(data)) is None:
            unknown.append(name)
            continue
        if both := wanted.keys() & there.keys():
            found |= both
            places[name] = {"images": len(both), "first": sorted(wanted[key] for key in both)[:FIRST]}
    told = {"images": len(found), "of": len(wanted), "in": places}
    return told | ({"not_known": unknown} if unknown else {})


def _digests(data: Mapping[str, Any]) -> dict[str, str] | None:
    """{digest: image id} of a data section's splits; None where they aren't known."""
    if not isinstance(data.get("name"), str) or ":" in data["name"]:
        return None
    try:
        splits = image_digests.read(sources.folder_of(data))
    except InputError:
        return None  # whoever opens it says so
    return None if splits is None else image_digests.of_split(splits, str(data.get("split")))


def check_held_out(input_cfg: Mapping[str, Any]) -> None:
    """Refuses training sets that have images of `config.input.held_out`, a data section such as
    dict(name="slake/en", split="validate+test"): the same content, or, of two configs of one set, the same image_id.

    Raises:
      InputError: names both sets and images; or says which set can't be compared, since its build wrote no digests.
    """
    if not (held := input_cfg.get("held_out")):
        return
    held = dict(held)
    what = f"{held.get('name')} {held.get('split')}"
    wanted = _digests(held)
    if not wanted:
        raise InputError(f"input.held_out: of {what} no images are known; {_EXPECTED}")
    for data in trained_on(input_cfg):
        name = f"{data.get('name')} {data.get('split')}"
        if (there := _digests(data)) is None:
            raise InputError(f"input.held_out: whether {name} has images of {what} isn't known; {_EXPECTED}")
        found = {there[key] for key in wanted.keys() & there.keys()}
        if _set_of(data) == _set_of(held):
            found |= {*there.values()} & {*wanted.values()}
        if found:
            first = ", ".join(sorted(found)[:FIRST])
            raise InputError(
                f"input: {name} has {len(found)} images of input.held_out, {what}, such as {first}; expected none"
            )


def _set_of(data):
    return str(data.get("name")).partition("/")[0]


_EXPECTED = f"expected a set built by data_prep.build, which writes {image_digests.NAME}"


def line(name: str, shared: Mapping[str, Any]) -> str:
    """What to say about the evaluation `name`; "" if it shares nothing."""
    if not shared.get("images"):
        return ""
    first = next(iter(shared["in"].values()))["first"]
    return (
        f"{shared['images']:,} of {shared['of']:,} images of the evaluation {name} are in what is trained on "
        f"({', '.join(shared['in'])}), such as {first[0]}: its figures are partly about images seen in training."
    )
