"""Connectors by themselves, under the names that they have where they come from.

  the tower's head, one or two linear layers   LLaVA's: `model.mm_projector` (model/llava_arch.py)
  groups of neighbours, one linear layer       MiniGPT-v2's and PeFoMed's: `llama_proj` (models/minigpt_v2.py)
  a query transformer                          transformers' BLIP-2: `qformer`, `query_tokens`, `language_projection`
  means of squares, a norm, a linear layer     transformers' Gemma 3: `multi_modal_projector`

The number of neighbours or of a square's patches is no weight, and isn't in the file.
"""

from collections.abc import Collection, Mapping
from typing import Any

from paligemma_med.checkpoints.hf import gemma3, qformer
from paligemma_med.checkpoints.hf.layout import Row, dense

_LLAVA, _MINIGPT, _BLIP2 = "model.mm_projector", "llama_proj", "language_projection"


def rows_of(paths: Collection[str], connector: Mapping[str, Any] | None = None) -> tuple[Row, ...]:
    """The rows of what is between tower and language model in a model with leaves of these paths; none if there is
    nothing.

    Args:
      connector: config.model.connector.
    """
    if "connector/queries" in paths:
        return tuple(_renamed(row, _BLIP2) for row in qformer.rows())
    if "connector/norm/scale" in paths:
        return gemma3.projector_rows()
    if "connector/proj/kernel" in paths:
        name = _MINIGPT if (connector or {}).get("reduce") == "group" else _LLAVA
        hidden = "connector/hidden/kernel" in paths
        return tuple(_renamed(row, name) for row in qformer.projection_rows(hidden=hidden))
    return tuple(dense(_LLAVA, "img/head")) if "img/head/kernel" in paths else ()


def _renamed(row, name):
    if not row.name.startswith(f"{qformer.PROJECTION}."):
        return row
    return row._replace(name=name + row.name.removeprefix(qformer.PROJECTION))
