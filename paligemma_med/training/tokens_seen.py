"""How many tokens a run has been trained on: the D of the paper's scaling law (equation 1, figure 5).

`tokens_seen` counts the text of every example, prompt and answer, up to the last one that has a loss: image tokens and
padding aren't counted. `answer_tokens_seen` counts those that have a loss. What is shown again in another epoch counts
again; a step that changed nothing (`skip_nonfinite`) doesn't.
"""

import jax
import jax.numpy as jnp

NAMES = ("tokens_seen", "answer_tokens_seen")


def of_batch(mask_loss) -> dict[str, jax.Array]:
    """{name: int32[]} of a batch.

    Args:
      mask_loss: [B, T + 1], nonzero where a token is supervised. An answer's EOS is the last of its row.
    """
    supervised = mask_loss > 0
    last = jnp.max(jnp.where(supervised, jnp.arange(1, mask_loss.shape[1] + 1), 0), axis=1)
    return dict(zip(NAMES, (last.sum(dtype=jnp.int32), supervised.sum(dtype=jnp.int32))))


class TokensSeen:
    """Adds up what steps have counted, without waiting for them."""

    def __init__(self, seen: dict[str, int] | None):
        """
        Args:
          seen: before this start; None if it isn't known (a checkpoint of an earlier version), and then nothing is
            counted.
        """
        self._seen, self._steps = seen, []

    def add(self, metrics) -> None:
        """Keeps the counts among a step's metrics, which may still be computed."""
        if self._seen is not None:
            self._steps.append({name: metrics[name] for name in NAMES})

    def read(self) -> dict[str, int] | None:
        """{name: tokens since step 0}, after waiting for the steps; None if that isn't known."""
        steps, self._steps = jax.device_get(self._steps), []
        for step in steps:
            self._seen = {name: count + int(step[name]) for name, count in self._seen.items()}
        return self._seen
