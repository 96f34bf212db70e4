"""From a sequence's positions back to the image's patches and the text.

A method gives each position of the language model's sequence a share. A *map* has a column for each
patch of the image, row by row, and then one for each token of the text, in their own order, wherever
the image stands in the sequence and however many tokens the language model reads of it. The model
knows both (`splice.Layout`, `connector.to_cells`); the methods needn't.

Axis letters: S positions of the sequence; P patches, T tokens of the text, P + T columns of a map;
R tokens of the answer.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from paligemma_med.models import connector as connectors
from paligemma_med.models import splice, vlm

MULTIPLE = 8  # R is padded to multiples of it, so that few programs are compiled
INPUTS = ("image", "text", "mask_ar", "image_at")


@dataclasses.dataclass(frozen=True)
class Trace:
    """Maps one example's positions to patches and text; usable inside jitted functions and outside.

    Attributes:
      grid: (rows, columns) of patches.
      layout: `splice.Layout` of its one row.
      connector: config of the model's connector, or None.
    """

    grid: tuple[int, int]
    layout: splice.Layout
    connector: dict | None = None

    @property
    def patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    def map(self, rows, out=None, *, rule) -> jnp.ndarray:
        """Shares of positions float[…, S] → float[…, P + T].

        Args:
          out: the model's out-dict of a pass with its attention captured.
          rule: one of `connector.RULES`: how a connector's own attention is followed.
        """
        if self.layout.image_at is None and self.connector is None:
            return rows
        of_connector = {k.removeprefix("connector/"): v for k, v in (out or {}).items() if k.startswith("connector/")}
        cells = connectors.to_cells(self.connector, self.layout.of_image(rows), of_connector, rule=rule)
        text = self.layout.slot(jnp.arange(self.layout.num_text)[None])[0]
        return jnp.concatenate([cells, jnp.take(rows, text, axis=-1)], axis=-1)

    def predicted(self, queries) -> jnp.ndarray:
        """Tokens of the text, int[R], that positions int[R] of the sequence predict."""
        return self.layout.predicted(queries[None])[0]

    def check_queries(self, queries, *, last=0) -> np.ndarray:
        """int32[R] positions, after checking that each predicts a token of the text, or what follows it.

        Args:
          last: 1 to refuse the latter.

        Raises:
          ValueError: no positions, or others.
        """
        queries = np.asarray(queries, np.int32).reshape(-1)
        known = np.asarray(self.layout.query(1 + np.arange(self.layout.num_text - last)[None]))[0]
        if not queries.size or not np.isin(queries, known).all():
            expected = f"positions of the text{' but the last one' * last}, {known[0]} to {known[-1]}"
            if self.layout.image_at is not None:
                expected = f"positions that predict its text, of {known.tolist()}"
            raise ValueError(f"queries are {queries.tolist()}; expected {expected}.")
        return queries


def of(model, batch) -> Trace:
    """`Trace` of a batch of one: image float[1, H, W, 3], text int[1, T], perhaps image_at int[1]."""
    return Trace(vlm.patch_grid(model, batch["image"]), vlm.layout_of(model, batch), model.connector)


def inputs(batch) -> dict:
    """The arrays of a batch that the model reads.

    Raises:
      ValueError: a batch of several rows.
    """
    rows = len(batch["text"])
    if rows != 1:
        raise ValueError(f"The batch has {rows} rows; expected one.")
    return {k: np.asarray(batch[k]) for k in INPUTS if k in batch}


def padded(x) -> np.ndarray:
    """[R, …] with its last row repeated to fill up to a multiple of MULTIPLE."""
    return np.pad(x, [(0, -len(x) % MULTIPLE)] + [(0, 0)] * (np.ndim(x) - 1), mode="edge")
