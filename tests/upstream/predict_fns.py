"""big_vision's predict_fns on our model, next to our own decoding: a program for test_evaluators.

Prints one JSON object once everything agrees.
"""

import json

import jax
import numpy as np

from paligemma_med import decode, upstream
from paligemma_med.models import paligemma
from tests.rounding import assert_close

upstream.install()
from big_vision.trainers.proj.paligemma import predict_fns  # noqa: E402  after install

NEW = 6


def main():
    devices = np.array(jax.devices())
    rules = [("llm/.*attn.*", dict(rank=2))]
    model = paligemma.Model(img=dict(variant="mu/16"), llm=dict(variant="gemma_mu", vocab_size=300), lora=rules)
    params = paligemma.init_params(model, jax.random.key(0), image_size=32)
    # Away from the start, where adapters do nothing.
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    rng = np.random.default_rng(0)
    lengths = np.array([3, 10, 5, 1])
    batch = dict(
        image=rng.random((4, 32, 32, 3), np.float32) * 2 - 1,
        text=rng.integers(3, 300, (4, 10)).astype(np.int32),
        mask_ar=np.zeros((4, 10), np.int32),
        mask_input=(np.arange(10) < lengths[:, None]).astype(np.int32),
        _mask=np.array([1, 1, 1, 0], bool),
    )
    state, valid = {"params": params}, batch["_mask"]
    fns = predict_fns.get_all(model)
    kw = dict(devices=devices, eos_token=1, max_decode_len=NEW)

    tokens, logp = fns["decode_with_logp"](state, batch, **kw)
    ours, ours_logp = decode.generate(model, params, batch, max_new_tokens=NEW)
    np.testing.assert_array_equal(tokens[valid], ours[valid, 0])
    assert_close(logp[valid], ours_logp[valid, 0], units=32)

    # Of several samples the most probable: never less so than one alone would be by chance.
    best, _ = fns["decode_with_logp"](state, batch, best_of_n=3, sampler="nucleus(0.9)", eos_look_behind=1, **kw)
    beams = fns["beam_decode"](state, batch, beam_size=3, **kw)
    assert best.shape == beams.shape == (4, NEW)

    pooled, out = fns["image_avg_repr"](state, batch)
    zimg, _ = model.apply(state, batch["image"], method="embed_image")
    assert pooled.shape == (4, out["img/pre_logits"].shape[-1])
    assert_close(out["img/zimg"], zimg)

    logits, _ = fns["logits"](state, batch)
    assert logits.shape == (4, 9, 300)
    print(json.dumps(dict(devices=len(devices), tokens=np.asarray(tokens).tolist())))


if __name__ == "__main__":
    main()
