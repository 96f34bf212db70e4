"""Our `decode.generate` as a side of a benchmark; see `workers`."""

import jax
import numpy as np

from paligemma_med import decode
from paligemma_med.models import flops
from tools.bench import peers_ours, sizes, workers

NO_TOKEN = -1  # never drawn, so that no answer ends early


def build(settings) -> peers_ours.JaxSide:
    """See `workers`. settings: size, dtype, weights (a folder), rows (questions), samples, tokens,
    scan, attn_impl."""
    size, tokens = sizes.SIZES[settings["size"]], settings["tokens"]
    model, params = peers_ours.put_weights(settings)
    batch = sizes.draw_prompts(size, settings["rows"])
    lengths = batch["mask_input"].sum(axis=1)
    # Each call reads the text on the host, but not the image.
    batch["image"] = jax.device_put(batch["image"])
    calls = 0

    def call(**drawing):
        return decode.generate(model, params, batch, max_new_tokens=tokens, eos_token=NO_TOKEN, **drawing)[0]

    def step():
        nonlocal calls
        calls += 1
        return call(num_samples=settings["samples"], temperature=1.0, seed=calls)

    counted = [
        flops.count_answers(
            model, res=size.res, prompt_len=int(n), samples=settings["samples"], tokens=tokens
        ).per_example_model
        for n in lengths
    ]
    about = dict(parameters=sum(x.size for x in jax.tree.leaves(params)), flops_a_step=sum(counted))
    side = peers_ours.JaxSide(step, settings["dtype"], about)
    side.value = lambda found: float(np.asarray(found).size)
    side.result = lambda: np.asarray(call())[:, 0].tolist()
    return side


if __name__ == "__main__":
    workers.serve(peers_ours.device, build)
