"""Our streamed capture of an answer's attention as a side of a benchmark; see `workers`."""

import jax
import numpy as np

from paligemma_med.models import flops, vlm
from paligemma_med.saliency import capture
from tools.bench import peers_ours, sizes, workers


def build(settings) -> peers_ours.JaxSide:
    """See `workers`. settings: size, dtype, weights (a folder), scan, attn_impl."""
    size = sizes.SIZES[settings["size"]]
    model, params = peers_ours.put_weights(settings)
    batch = sizes.draw_batch(size, 1)
    # The last token is predicted, not read.
    batch = {k: x if k == "image" else x[:, : size.text_len] for k, x in batch.items()}
    # The positions that predict the answer; the last token's own isn't one.
    answer = np.flatnonzero(batch["mask_ar"][0])
    queries = vlm.layout_of(model, batch).query(answer[None])[0]

    def step():
        return capture.streamed(model, params, batch, queries)

    counted = flops.count_pass(model, res=size.res, text_len=size.text_len, logits=len(queries))
    about = dict(
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        flops_a_step=counted.per_example_model,
    )
    side = peers_ours.JaxSide(step, settings["dtype"], about)
    side.value = lambda found: float(found.logprobs.sum())

    def result():
        found = step()
        return dict(
            rollout=found.rollout.tolist(),
            image_rollout=found.img_rollout[:8].tolist(),
            logprobs=found.logprobs.tolist(),
        )

    side.result = result
    return side


if __name__ == "__main__":
    workers.serve(peers_ours.device, build)
