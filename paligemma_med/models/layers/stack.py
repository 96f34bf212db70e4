"""A stack of equal layers over parameters stacked on a leading axis."""

from collections.abc import Callable

import flax.linen as nn
import jax


def repeat(
    block: type[nn.Module],
    depth: int,
    scan: bool,
    remat_policy: str,
    variable_axes: dict[str, int] | None = None,
    in_axes=nn.broadcast,
) -> Callable[..., nn.Module]:
    """Repeats `block`, a scan body, `depth` times.

    Args:
      variable_axes: {collection: axis of layers} beside parameters.
      in_axes: of the body's arguments after the carry, as for `nn.scan`: the same for all layers, or the axis of
        layers.

    The loop is always `nn.scan`, so that parameters have one layout; `scan=False` unrolls it fully,
    which compiles more slowly and lets XLA optimise across layers. `remat_policy` says what is kept for a
    layer's backward pass rather than recomputed.
    """
    if remat_policy != "none":
        policy = getattr(jax.checkpoint_policies, remat_policy, None)
        if policy is None:
            raise ValueError(
                f"remat_policy is {remat_policy!r}; expected 'none' or a name in "
                "jax.checkpoint_policies, such as 'nothing_saveable'."
            )
        block = nn.remat(block, prevent_cse=not scan, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0, "perturbations": 0, **(variable_axes or {})},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=1 if scan else depth,
    )
