"""Five answers to each question: `decode.generate` beside transformers' `generate` on a CPU.

Both have the same random weights (ours, written by `save_hf`), images, prompts, threads and number
type, and draw `samples` answers of exactly `tokens` tokens at temperature 1: no token is an EOS, so
that neither side can stop early. The peer is called as people do, `num_return_sequences=samples`;
it pads to the longest prompt, on the left. Before any time is taken, the greedy answers of both are
compared: what is measured is the same computation. Compilation (ours) and a first call (theirs) are
left out; turns alternate. On a machine that others use, too, `cpu_ratio` (of the processor's time,
all threads) is the steadier figure.

What the ratio depends on: the peer reads a prompt once a sample, we once. With N prefill positions
and M new tokens the most that could be had of it is samples·(N + M) / (N + samples·M), less what a
step of few rows costs more than a position of a prefill.
"""

import os
import statistics
import tempfile
import time

import numpy as np

VOCAB = 32_768
# 22 M in the image tower, 219 M in the language model.
MODEL = dict(
    img=dict(variant="S/14", scan=False),
    llm=dict(
        width=1024, depth=12, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=128,
        vocab_size=VOCAB, scan=False,
    ),
)  # fmt: skip
PROMPT_LENGTHS = (12, 28)  # tokens, from and to: those of VQA questions


def run(*, res, batch_size, rounds, samples, tokens, peer, cores):
    """Measures both.

    Returns:
      dict: seconds a call and answers per second of each (medians over rounds), `ratio`,
      `cpu_ratio`, and what the figures hold for.

    Raises:
      ValueError: the two don't give the same greedy answers.
    """
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    import jax

    jax.config.update("jax_platforms", "cpu")
    model, params = make_model(res)
    batch = make_batch(res, batch_size)
    sides = {"ours": ours(model, params, batch, samples, tokens)}
    if peer == "hf":
        with tempfile.TemporaryDirectory(prefix="decode-speed-") as folder:
            theirs = load_peer(model, params, folder, cores)
        sides["hf"] = transformers_side(theirs, batch, samples, tokens)
    greedy = {name: call(greedy=True) for name, call in sides.items()}
    for name, found in greedy.items():
        if not np.array_equal(found, greedy["ours"]):
            same = np.mean(found == greedy["ours"])
            raise ValueError(f"greedy answers of {name} differ from ours: {same:.1%} are the same.")
    for call in sides.values():
        call(greedy=False)
    seconds, cpu = ({name: [] for name in sides} for _ in range(2))
    for i in range(rounds):
        for name, call in sides.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            call(greedy=False, seed=i)
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    medians, cpu = ({n: statistics.median(s) for n, s in x.items()} for x in (seconds, cpu))
    leaves = jax.tree.leaves(params)
    out = {
        "parameters": sum(x.size for x in leaves), "res": res, "batch_size": batch_size,
        "samples": samples, "tokens": tokens, "cores": cores, "rounds": rounds,
        "seconds_a_call": {n: [round(x, 3) for x in s] for n, s in seconds.items()},
        "median_seconds": {n: round(x, 3) for n, x in medians.items()},
        "median_cpu_seconds": {n: round(x, 3) for n, x in cpu.items()},
        "answers_per_second": {
            n: round(batch_size * samples / x, 2) for n, x in medians.items()
        },
        "load": os.getloadavg()[0],
    }  # fmt: skip
    if peer == "hf":
        out["cpu_ratio"] = round(cpu["hf"] / cpu["ours"], 2)
        out["ratio"] = medians["hf"] / medians["ours"]
    return out


def make_model(res):
    """(model, random parameters): of the sizes above, every leaf random."""
    import jax

    from paligemma_med.models import paligemma

    model = paligemma.Model(**MODEL)
    abstract = paligemma.abstract_params(model, image_size=res)
    rng = np.random.default_rng(0)

    def draw(path, x):
        # Matrices as they are initialised, vectors (biases, norms) small.
        fan_in = 1 if path[-1].key in ("bias", "scale") else x.shape[-2]
        return rng.normal(0, 0.02 if fan_in == 1 else fan_in**-0.5, x.shape).astype(np.float32)

    return model, jax.device_put(jax.tree_util.tree_map_with_path(draw, abstract))


def make_batch(res, rows):
    rng = np.random.default_rng(1)
    lengths = rng.integers(*PROMPT_LENGTHS, rows, endpoint=True)
    lengths[0] = PROMPT_LENGTHS[1]
    on = np.arange(64) < lengths[:, None]
    return dict(
        image=rng.uniform(-1, 1, (rows, res, res, 3)).astype(np.float32),
        text=np.where(on, rng.integers(3, VOCAB, on.shape), 0).astype(np.int32),
        mask_ar=np.where(on, 0, 1).astype(np.int32),
        mask_input=on.astype(np.int32),
    )


def ours(model, params, batch, samples, tokens):
    from paligemma_med import decode

    def call(greedy, seed=0):
        drawing = dict(num_samples=1) if greedy else dict(num_samples=samples, temperature=1.0)
        found, _ = decode.generate(
            model, params, batch, max_new_tokens=tokens, eos_token=-1, seed=seed, **drawing
        )
        return np.asarray(found).reshape(-1, tokens)

    return call


def load_peer(model, params, folder, cores):
    import jax
    import torch
    import transformers

    from paligemma_med.checkpoints import hf

    torch.set_num_threads(cores)
    path = os.path.join(folder, "peer")
    hf.save_hf(path, jax.device_get(params), img=dict(model.img), llm=dict(model.llm))
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32
    )
    return theirs.eval()


def transformers_side(theirs, batch, samples, tokens):
    import torch

    image_token = theirs.config.image_token_id
    rows, patches = len(batch["text"]), theirs.config.text_config.num_image_tokens
    lengths = batch["mask_input"].sum(axis=1)
    width = patches + lengths.max()
    ids, mask = np.zeros((2, rows, width), np.int64)
    for i, n in enumerate(lengths):
        ids[i, width - n :], mask[i, width - n - patches :] = batch["text"][i, :n], 1
        ids[i, width - n - patches : width - n] = image_token
    inputs = dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        token_type_ids=torch.zeros(ids.shape, dtype=torch.long),
        pixel_values=torch.tensor(batch["image"].transpose(0, 3, 1, 2)),
    )

    def call(greedy, seed=0):
        torch.manual_seed(seed)
        drawing = dict(do_sample=False) if greedy else dict(
            do_sample=True, num_return_sequences=samples, temperature=1.0, top_k=0, top_p=1.0
        )  # fmt: skip
        with torch.inference_mode():
            out = theirs.generate(
                **inputs, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0, **drawing
            )
        return out[:, width:].numpy()

    return call
