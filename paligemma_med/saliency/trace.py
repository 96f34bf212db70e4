"""From a sequence's positions back to the image's patches and the text.

A method gives each position of the language model's sequence a share. A *map* has a column for each
patch of the image, row by row, and then one for each token of the text, in their own order, wherever
the image stands in the sequence and however many tokens the language model reads of it. The model
knows both (`splice.Layout`, `connector.to_cells`); the methods needn't.

Axis letters: S positions of the sequence; P patches, T tokens of the text, P + T columns of a map;
R tokens of the answer.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import connector as connectors
from paligemma_med.models import splice, vlm

MULTIPLE = 8  # R is padded to multiples of it, so that few programs are compiled
INPUTS = ("image", "text", "mask_ar", "image_at")


class Shares(NamedTuple):
    """Maps float32[…, P + T], and what of their rows is on learned constants, float32[…], or None if the model has
    none there."""

    values: jax.Array
    constants: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Trace:
    """Maps one example's positions to patches and text; usable inside jitted functions and outside.

    Attributes:
      grid: (rows, columns) of patches.
      layout: `splice.Layout` of its one row.
      connector: config of the model's connector, or None.
      class_tokens: of the tower (`parts.Tower`).
    """

    grid: tuple[int, int]
    layout: splice.Layout
    connector: dict | None = None
    class_tokens: tuple[int, int] = (0, 0)

    @property
    def patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    @property
    def tower_tokens(self) -> int:
        """How many tokens the tower's layers have: P and class tokens, which are in front."""
        return self.class_tokens[0] + self.patches

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the connector's attention (`connector.slots`)."""
        return connectors.slots(self.connector, self.class_tokens[1] + self.patches)

    def map(self, rows, out=None, *, rule, through=None) -> Shares:
        """Shares of positions float[…, S] → `Shares`.

        What a query transformer's learned queries or a class token's learned embedding hold of a share is of no place
        in the image. Under "raw" and "rollout" the image's columns are scaled by what is left, so that rows keep their
        sum. Relevancy, whose rows have no sum to keep, leaves it out.

        Args:
          out: the connector's attention {"connector/…": float[layers, 1, …]}, as a model's out-dict has it.
          rule: one of `connector.RULES`: how a connector's own attention is followed.
          through: carries shares float[…, tower_tokens] on through the image tower.
        """
        of_image = self.layout.of_image(rows)
        of_connector = {
            k.removeprefix("connector/"): v[:, 0] for k, v in (out or {}).items() if k.startswith("connector/")
        }
        tokens = connectors.to_cells(self.connector, of_image, of_connector, rule=rule)
        if dropped := self.class_tokens[0] - self.class_tokens[1]:
            tokens = jnp.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(dropped, 0)])
        tokens = tokens if through is None else through(tokens)
        cells, constants = tokens[..., self.class_tokens[0] :], None
        # A class token that isn't read gets its first share within the tower.
        held = self.slots or self.class_tokens[through is None]
        if held and rule != "relevancy":
            total, left = jnp.sum(of_image, axis=-1), jnp.sum(cells, axis=-1)
            constants = jnp.maximum(total - left, 0.0)
            cells = cells * jnp.where(left > 0, total / jnp.where(left > 0, left, 1.0), 0.0)[..., None]
        text = rows[..., self.layout.num_image :]
        if self.layout.image_at is not None:
            text = jnp.take(rows, self.layout.slot(jnp.arange(self.layout.num_text)[None])[0], axis=-1)
        return Shares(jnp.concatenate([cells, text], axis=-1), constants)

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
        # The first token is predicted only by an image that is known to be in front of it.
        first = int(self.layout.image_at is None or self.layout.image_at[0] > 0)
        known = np.asarray(self.layout.query(np.arange(first, self.layout.num_text + 1 - last)[None]))[0]
        if not queries.size or not np.isin(queries, known).all():
            expected = f"positions of the text{' but the last one' * last}, {known[0]} to {known[-1]}"
            if self.layout.image_at is not None:
                expected = f"positions that predict its text, of {known.tolist()}"
            raise ValueError(f"queries are {queries.tolist()}; expected {expected}.")
        return queries


def of(model, batch) -> Trace:
    """`Trace` of a batch of one: image float[1, H, W, 3], text int[1, T], perhaps image_at int[1]."""
    tower = model.parts["img"]
    grid = vlm.patch_grid(model, batch["image"])
    return Trace(grid, vlm.layout_of(model, batch), model.connector, tower.class_tokens)


def inputs(batch) -> dict:
    """The arrays of a batch that the model reads.

    Raises:
      ValueError: a batch of several rows.
    """
    rows = len(batch["text"])
    if rows != 1:
        raise ValueError(f"The batch has {rows} rows; expected one.")
    return {k: np.asarray(batch[k]) for k in INPUTS if k in batch}


def padded(x, least=0) -> np.ndarray:
    """[R, …] with its last row repeated to fill up to a multiple of MULTIPLE that is `least` or more."""
    rows = -(-max(len(x), least) // MULTIPLE) * MULTIPLE
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (np.ndim(x) - 1), mode="edge")
