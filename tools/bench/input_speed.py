"""The input pipeline against torch's DataLoader with the Hugging Face processor, on the same files.

Both read SLAKE's questions and images, decode, resize to the model's resolution, tokenize prompt and
answer, and make batches for a training step; both are bound to the same cores and do nothing else.
Ours goes through TFDS, Grain and pp to arrays on the device; the peer through PIL, `PaliGemmaProcessor`
in the collate function, and a DataLoader, as in the fine-tuning scripts that people copy. The
peer resizes bicubically, as its processor does.
"""

import os
import pathlib
import statistics
import time

import jax

from configs import common
from data_prep.datasets.slake import layout as slake_layout
from paligemma_med import input_pipeline
from paligemma_med.pp import images as images_lib
from paligemma_med.pp import markdown
from tools.bench import machine, sizes, turns

# More batches than either side prefetches.
_AHEAD = 8


def run(
    *,
    size,
    data,
    split,
    data_dir,
    manual_dir,
    res,
    batch_size,
    rounds,
    batches,
    peer,
    cores,
    text_len=64,
) -> dict:
    """Measures both.

    Args:
      size: a name in `sizes.SIZES`, which gives the default of res and is otherwise unused.
      peer: "hf" or "none".

    Returns:
      dict: examples per second per core, and per second of the processor, of each (medians over rounds), `ratio`,
      `cpu_ratio`, the conditions of the measurement, and "row", a line of a Markdown table. The processor's time is
      that of this process: with more than one core the peer's workers aren't in it.

    Raises:
      ValueError: an unknown name, no tokenizer ($PALIGEMMA_TOKENIZER), or no manual_dir for the
        peer.
    """
    sizes.check(size, "lora", None)
    turns.check(peer, ("hf", "none"), rounds=rounds, batches=batches, batch_size=batch_size)
    res = res or sizes.SIZES[size].res
    if not os.environ.get("PALIGEMMA_TOKENIZER"):
        raise ValueError("$PALIGEMMA_TOKENIZER must name the Gemma tokenizer's file.")
    jax.config.update("jax_platforms", "cpu")  # only the host's work is measured
    turns.bind(cores)
    sides = {"ours": _ours(data, split, data_dir, res, batch_size, cores, text_len)}
    if peer == "hf":
        if not manual_dir:
            raise ValueError("--manual_dir is needed for the peer, which reads the released files.")
        language = data.partition("/")[2]
        sides["hf"] = _torch(manual_dir, language, split, res, batch_size, cores)
    seconds, cpu = ({name: [] for name in sides} for _ in range(2))
    watch = machine.Watch()
    for _ in range(rounds):
        for name, take in sides.items():
            # Leaves out imports and caches, and batches prefetched while the other had its turn.
            take(_AHEAD)
            start, processor = time.perf_counter(), time.process_time()
            take(batches)
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - processor)
    others = watch.found()
    count = batches * batch_size
    out = {
        "data": data,
        "res": res,
        "batch_size": batch_size,
        "cores": cores,
        "rounds": rounds,
        "examples_per_second_per_core": {n: round(count / statistics.median(s) / cores, 1) for n, s in seconds.items()},
        "examples_per_cpu_second": {n: round(count / statistics.median(s), 1) for n, s in cpu.items()},
        "seconds_a_round": {n: [round(x, 3) for x in s] for n, s in seconds.items()},
        **others,
        **turns.surroundings([dict(device="cpu", jax=jax.__version__)]),
    }
    if peer != "none":
        out["ratio"] = statistics.median(seconds["hf"]) / statistics.median(seconds["ours"])
        out["cpu_ratio"] = round(statistics.median(cpu["hf"]) / statistics.median(cpu["ours"]), 2)
    keys = "examples_per_second_per_core", "examples_per_cpu_second"
    speeds = [", ".join(f"{x:.1f}" for x in out[key].values()) for key in keys]
    work = f"input, {data}, {res} px, batch {batch_size}" + f", {peer}" * (peer != "none")
    ratios = turns.ratio(out), turns.ratio(out, "cpu_ratio")
    return {**out, "row": markdown.row([work, *speeds, *ratios, turns.where(out)])}


def _ours(name, split, data_dir, res, batch_size, cores, text_len):
    where = dict(data_dir=data_dir) if data_dir else {}
    batches = input_pipeline.training(
        dict(
            data=dict(name=name, split=split, **where),
            pp=common.train_pp(res, text_len, common.GEMMA),
            batch_size=batch_size,
            num_threads=cores,
            prefetch=1,
        ),
        seed=0,
    )

    def take(n):
        for _ in range(n):
            jax.block_until_ready(next(batches))

    return take


def _torch(manual_dir, language, split, res, batch_size, cores):
    import torch
    import transformers

    torch.set_num_threads(cores)
    folder = slake_layout.read_folder(pathlib.Path(manual_dir).expanduser(), language)
    rows = folder.rows[split]
    tokenizer = transformers.GemmaTokenizerFast(tokenizer_file=os.environ["PALIGEMMA_TOKENIZER"])
    images = transformers.SiglipImageProcessor(size=dict(height=res, width=res), resample=3)
    images.image_seq_length = (res // 14) ** 2
    processor = transformers.PaliGemmaProcessor(images, tokenizer)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            with images_lib.open_image(rows[i].image.read_bytes()) as image:
                return image.convert("RGB"), rows[i].features

    def collate(items):
        return processor(
            images=[image for image, _ in items],
            text=[f"<image>answer en {f['question']}" for _, f in items],
            suffix=[f["answer"] for _, f in items],
            return_tensors="pt",
            padding="longest",
        )

    loader = torch.utils.data.DataLoader(
        Rows(),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=0 if cores == 1 else cores,
        generator=torch.Generator().manual_seed(0),
    )
    batches = iter(loader)

    def take(n):
        nonlocal batches
        for _ in range(n):
            try:
                next(batches)
            except StopIteration:
                batches = iter(loader)
                next(batches)

    return take
