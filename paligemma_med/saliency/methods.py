"""The methods of saliency: what each is called, what its maps say, and how they are made.

A new method is a file of this folder and an entry here; `explain`, its page and tools.eval_saliency
take it from this table.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from paligemma_med.saliency import occlusion, relevancy
from paligemma_med.saliency.passes import Map, Passes


class Kind(NamedTuple):
    """A kind of map, as a page shows it.

    Attributes:
      title, says: its name, and what such a map says.
      preferred: a page opens with the available kind that has the highest number.
      shares: whether a row over image, prompt and answer so far sums to 1.
      signed: whether values can be negative.
    """

    title: str
    says: str
    preferred: int
    shares: bool = False
    signed: bool = False


class Method(NamedTuple):
    """Kinds of maps that are computed together.

    Attributes:
      kinds: {name: Kind} of its maps.
      maps: `Passes` → its maps, whose `method` is one of `kinds`; tools.eval_saliency measures the
        first of each kind. If it takes long, it calls its `progress` with how many parts are done, and of how many.
    """

    kinds: dict[str, Kind]
    maps: Callable[..., list[Map]]


def _raw(passes: Passes, progress=None) -> list[Map]:
    # A report always has raw attention, by layer and head: `Arrays.raw`.
    del passes, progress
    return []


def _with_tower(name, variant, row, carried):
    """The map `name`, and the same map carried on through the image tower."""
    return [Map(name, variant, *row), Map(f"{name}_siglip", variant, *carried)]


def _rollout(passes: Passes, progress=None) -> list[Map]:
    del progress  # one pass, which raw attention comes from as well
    found = (_with_tower("rollout", v, *pair) for v, pair in passes.attention.rollouts.items())
    return [m for pair in found for m in pair]


def _relevancy(passes: Passes, progress=None) -> list[Map]:
    seq = passes.seq
    # Without the 1 that each row starts from, which would dominate the rest.
    found = relevancy.relevancy(
        passes.model, passes.params, seq.batch, seq.queries, seq.tokens, own=False, least=seq.least, progress=progress
    )
    rows = found.rows[:, : seq.response.stop]
    carried = np.concatenate([found.patches, rows[:, seq.patches :]], axis=1)
    return _with_tower("relevancy", "", (rows,), (carried,))


def _occlusion(passes: Passes, progress=None) -> list[Map]:
    """Each patch gets the value of its cell."""
    seq, cell = passes.seq, passes.cell
    drops = occlusion.occlusion(
        passes.score,
        seq.batch["image"][0],
        seq.grid,
        cell=cell,
        fill=passes.fill,
        batch_size=passes.batch_size,
        progress=progress,
    )
    drops = drops.repeat(cell, axis=1).repeat(cell, axis=2)[:, : seq.grid[0], : seq.grid[1]]
    return [Map("occlusion", "", drops.reshape(len(drops), -1))]


_RAW = {
    "raw": Kind(
        "Raw attention",
        "What the query of an answer token weighs in chosen layers and heads. A row sums to 1 "
        "over image, prompt and answer so far. High attention is not yet importance: what is read "
        "may be ignored by later layers.",
        preferred=0,
        shares=True,
    ),
}
_ROLLOUT = {
    "rollout": Kind(
        "Attention rollout",
        "Attention of all layers of the language model multiplied from the first up, each "
        "averaged with the identity for its residual. It follows where information could have "
        "come from, whatever the answer's class.",
        preferred=1,
        shares=True,
    ),
    "rollout_siglip": Kind(
        "Rollout through the image tower",
        "Attention rollout, carried on through the image tower, whose layers mix patches before "
        "the language model sees them: from its tokens back to places in the image.",
        preferred=2,
        shares=True,
    ),
}
_RELEVANCY = {
    "relevancy": Kind(
        "Gradient-weighted relevancy",
        "Attention weighted by how much it would raise this very token, layer by layer (Chefer et "
        "al. 2021). Unlike rollout it depends on what is answered.",
        preferred=3,
    ),
    "relevancy_siglip": Kind(
        "Relevancy through the image tower",
        "Gradient-weighted relevancy, carried on through the image tower, whose layers mix "
        "patches before the language model sees them: from its tokens back to places in the "
        "image.",
        preferred=4,
    ),
}
_OCCLUSION = {
    "occlusion": Kind(
        "Occlusion",
        "No attention at all: a cell of the image is replaced and the model asked again. A map "
        "gives the drop of the tokens' log-probability; negative where they got likelier. The "
        "model may react to the replacement itself.",
        preferred=-1,
        signed=True,
    ),
}

METHODS = {
    "raw": Method(_RAW, _raw),
    "rollout": Method(_ROLLOUT, _rollout),
    "relevancy": Method(_RELEVANCY, _relevancy),
    "occlusion": Method(_OCCLUSION, _occlusion),
}
KINDS = {name: kind for method in METHODS.values() for name, kind in method.kinds.items()}
