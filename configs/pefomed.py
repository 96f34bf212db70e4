"""System 004, PeFoMed (arXiv 2401.02797): MiniGPT-v2's EVA ViT-g and LLaMA-2 7B chat, adapted in two stages.

    export LLAMA_TOKENIZER=/weights/Llama-2-7b-chat-hf/tokenizer.model
    python -m paligemma_med.train --workdir=out/pefomed1 --config=configs/pefomed.py:stage=1,\\
        img=/weights/eva_vit_g,connector=/weights/minigptv2,llm=/weights/Llama-2-7b-chat-hf
    python -m paligemma_med.train --workdir=out/pefomed2 --config=configs/pefomed.py:stage=2,init=out/pefomed1
    python -m paligemma_med.train --workdir=out/iu_xray --config=configs/pefomed.py:task=report,init=out/pefomed1

From the code (jinlHe/PeFoMed): LoRA on q and v, rank 64, alpha 16, dropout .05, and the projection, 56,627,200
parameters, in both stages; AdamW, weight decay .05 of matrices alone; after a warm-up from 1e-6, a cosine that is
constant within an epoch; four processes. Stage 1: captions of ROCO, CLEF 2022, MEDICAT and MIMIC-CXR, 60 to 60 to 20
to 60; 1e-5 to 1e-6, 5 epochs of 1000 steps of 4 x 100 examples, 1000 steps of warm-up. Stage 2: VQA-RAD, SLAKE in
English or PathVQA, each by itself, 1e-5 to 1e-6, 50 epochs of 100 steps of 4 examples; reports of IU-Xray, 3e-5 to
1e-5, 4 such epochs; 100 steps of warm-up.
Not from it:

images     the whole image, bicubic; theirs are cut at random and mirrored, in evaluation, too, which no argument does
start      theirs is MiniGPT-v2's projection and adapters (adapter_init=, connector=)
prompt     one instruction for questions, "[vqa] {question}", where theirs draws one of two; one for captions, one for
           chest X-rays, where theirs draws one of 17 and 15. Evaluation asks as training did
data       IU-Xray in R2Gen's layout, a row an image, with all its words in evaluation; MIMIC-CXR's findings, unless it
           was built with another target; ROCO is version 1
released   `strict_repro` (stage 2) evaluates as their code does where that differs from training: two BOS, <Img> where
           training had <img>, the second of the two instructions, the question as it stands, the tag of captions before
           reports; answers count by their exact match (protocol pefomed), reports against the first 50 words. Left out
           in any case: CLEF's and MEDICAT's instructions under a key that their model doesn't read (instruction_input
           for text_input); "$$" as padding, which has no loss; rows dropped silently where an image is missing

A set of stage 1 that isn't at hand is left out by naming the others: `sets=roco+medicat`. Shares are then those of the
sets that are left. The number of steps stays.

Arguments: stage, task (of stage 2: vqa or report), sets (of stage 1), strict_repro, data (one set, by default that of
the stage or task: vqa_rad/public, pathvqa/official, …), and those in configs/common_systems.py.
"""

from ml_collections import ConfigDict

from configs import common_prompts, common_systems

# Set → its name here, its weight, and what the model is asked.
SETS = {
    "roco": ("roco_v1/caption", 60, "caption"),
    "clef": ("imageclef_caption/caption", 60, "caption"),
    "medicat": ("medicat/caption", 20, "caption"),
    "mimic": ("mimic_cxr", 60, "findings"),
}
_DATA = {"vqa": "slake/en", "report": "iu_xray/r2gen"}
# What is trained on → learning rate, its end, epochs, steps in each; examples in a micro-batch, and micro-batches.
_RECIPES = {
    "caption": (1e-5, 1e-6, 5, 1000, 10, 40),
    "vqa": (1e-5, 1e-6, 50, 100, 4, 1),
    "report": (3e-5, 1e-5, 4, 100, 4, 1),
}
_WARMUP = {"caption": 1000, "vqa": 100, "report": 100}


def get_config(arg=None) -> ConfigDict:
    args = common_systems.parse_arg(
        arg, stage=2, task="vqa", sets="", strict_repro=False, data="", micro=0, accum=0, max_new_tokens=300
    )
    _check(args)
    task = "caption" if args.stage == 1 else args.task
    lr, end, epochs, steps, micro, accum = _RECIPES[task]
    args.micro, args.accum = args.micro or micro, args.accum or accum
    sets = {} if task != "caption" or args.data else _sets(args.sets)
    args.data = args.data or _DATA.get(task, "")
    # 50 words of an answer, and its prompt.
    c = common_systems.make(args, "pefomed", "llama", res=448, text_len=128 if task == "vqa" else 192, doc=__doc__)
    c.resample_posemb = "bicubic"  # EVA's file is of 224 px, and MiniGPT-v2 brings it to 448 in this way
    asked = common_prompts.pefomed(task, as_released=args.strict_repro)
    protocol = {"caption": "open", "vqa": "pefomed" if args.strict_repro else "vqa", "report": "report"}[task]
    kw = dict(resize="bicubic", protocol=protocol)
    if sets:
        mixed = {key: (name, weight, common_prompts.pefomed(says)) for key, (name, weight, says) in sets.items()}
        common_systems.mixture(c, args, mixed, **kw)
        if left := [key for key in SETS if key not in sets]:
            c.notes += f"\nLeft out of its captions, by sets={args.sets}: {', '.join(left)}."
    else:
        common_systems.texts(c, args, common_prompts.pefomed(task), asked=asked, **kw)
    if task == "report" and args.strict_repro:
        _cut_truth(c)
    c.lora = common_systems.lora(args, "llm/layers/attn/qkv_einsum/w:[qv]", rank=64, alpha=16, dropout=0.05)
    c.optax = dict(b2=0.999)
    common_systems.recipe(
        c,
        args,
        lr=lr,
        wd=0.05,
        steps=epochs * steps,
        decay="cosine",
        warmup=_WARMUP[task] / (epochs * steps),
        trained="connector/proj/.*",
        cosine_end=end / lr,
        warmup_start=1e-6 / lr,
        hold_percent=1 / epochs,
    )
    return c


def _check(args):
    if args.stage not in (1, 2):
        raise ValueError(f"Config argument stage={args.stage}: expected 1 or 2.")
    if args.task not in _DATA:
        raise ValueError(f"Config argument task={args.task!r}: expected one of {sorted(_DATA)}.")
    if args.stage == 1 and args.strict_repro:
        raise ValueError("Config argument strict_repro is of stage 2; captions are asked as in training.")
    if args.stage == 1 and args.task != "vqa":
        raise ValueError(f"Config argument task={args.task!r} is of stage 2; stage 1 has captions.")
    if args.sets and (args.stage != 1 or args.data):
        raise ValueError(f"Config argument sets={args.sets!r} is of stage 1, without data=….")


def _cut_truth(c):
    """Brings the reports that answers are compared with into BLIP's form, 50 words of it."""
    for section in c.evals.values():
        if section.type == "vqa":
            before, _, kept = section.pp_fn.rpartition("|keep(")
            section.pp_fn = f"{before}|{common_prompts.op('blip_text', inkey='answer', outkey='answer')}|keep({kept}"


def _sets(names):
    chosen = names.split("+") if names else [*SETS]
    if unknown := [name for name in chosen if name not in SETS]:
        raise ValueError(
            f"Config argument sets={names!r}: {unknown[0]!r} is unknown; expected some of {'+'.join(SETS)}."
        )
    return {name: SETS[name] for name in SETS if name in chosen}
