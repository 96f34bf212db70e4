"""What each of two processes of a run decodes, in `test_devices`: `python -m
tests.decode.two_processes OUT`. Writes OUT/<process>.json; alone it writes OUT/alone.json."""

import json
import pathlib

import jax
import numpy as np
from absl import app

from paligemma_med import decode
from paligemma_med.parallel import distributed, ending, sharding


def main(argv):
    distributed.start_from_flags(awaits_sigterm=False)
    from tests.decode.tiny_models import NO_EOS, make, make_batch

    model, params = make()
    params = jax.device_get(params)
    batch = make_batch([1, 20, 3, 4], text_len=40) | {"_mask": np.arange(4) < 3}
    mesh = sharding.make_mesh([("data", -1)])
    where = sharding.batch_sharding(mesh)
    placed = {k: distributed.place(v, where) for k, v in batch.items()}
    params = jax.tree.map(lambda x: distributed.place(x, sharding.replicated(mesh)), params)
    kw = dict(max_new_tokens=3, eos_token=NO_EOS)
    drawn = decode.generate(model, params, placed, num_samples=2, temperature=1.0, top_k=9, top_p=0.9, **kw)
    zimg = decode.encode_images(model, params, placed["image"])
    text = {k: v for k, v in placed.items() if k != "image"} | {"zimg": zimg}
    greedy = decode.generate(model, params, text, **kw)
    beams = decode.beam_search(model, params, placed, beams=3, **kw)
    options = np.asarray(distributed.to_host(beams[0]))
    scores = decode.score_options(model, params, placed, options, np.ones(options.shape, bool))
    found = [x.tolist() for x in distributed.to_host((*drawn, *greedy, *beams, *scores))]
    name = "alone" if ending.is_alone() else jax.process_index()
    pathlib.Path(argv[1], f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    distributed.define_flags()
    app.run(main)
