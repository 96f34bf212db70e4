"""System 004, PeFoMed (arXiv 2401.02797): MiniGPT-v2's EVA ViT-g and LLaMA-2 7B chat, adapted in two stages.

    export LLAMA_TOKENIZER=/weights/Llama-2-7b-chat-hf/tokenizer.model
    python -m paligemma_med.train --workdir=out/pefomed1 --config=configs/pefomed.py:stage=1,\\
        img=/weights/eva_vit_g,connector=/weights/minigptv2,llm=/weights/Llama-2-7b-chat-hf
    python -m paligemma_med.train --workdir=out/pefomed2 --config=configs/pefomed.py:stage=2,init=out/pefomed1

From the code (jinlHe/PeFoMed): LoRA on q and v, rank 64, alpha 16, dropout .05, and the projection, 56,627,200
parameters, in both stages; AdamW, weight decay .05 of kernels alone, learning rate 1e-5. Stage 1: captions, 5 x 1000
steps of 100 examples, 1000 steps of warm-up. Stage 2: one set of questions, 50 x 100 steps of 4 examples, 100 steps of
warm-up.
Not from it:

schedule   cosine to 0 at each step; theirs goes to 1e-6, in steps of an epoch (their paper doesn't say)
images     the whole image, bicubic; theirs are cut at random and mirrored, in evaluation, too
start      theirs is MiniGPT-v2's projection and adapters (adapter_init=, connector=)
prompt     one instruction for questions, "[vqa] {question}", where theirs draws one of two; one for captions, where
           theirs draws one of 17. Evaluation asks as training did; `strict_repro` asks as their evaluation does
data       captions of ROCOv2 (theirs: ROCO, CLEF 2022, MEDICAT, MIMIC-CXR), SLAKE in English

Arguments: stage, strict_repro, data (by default that of the stage), and those in configs/common_systems.py.
"""

from ml_collections import ConfigDict

from configs import common_prompts, common_systems

_DATA = {1: "rocov2/caption", 2: "slake/en"}
_STEPS, _WARMUP, _SIZE = 5000, {1: 1000, 2: 100}, {1: (10, 10), 2: (4, 1)}


def get_config(arg=None) -> ConfigDict:
    args = common_systems.parse_arg(arg, stage=2, strict_repro=False, data="", micro=0, accum=0, max_new_tokens=300)
    if args.stage not in _DATA:
        raise ValueError(f"Config argument stage={args.stage}: expected 1 or 2.")
    args.data = args.data or _DATA[args.stage]
    args.micro, args.accum = args.micro or _SIZE[args.stage][0], args.accum or _SIZE[args.stage][1]
    c = common_systems.make(args, "pefomed", "llama", res=448, text_len=128)
    c.resample_posemb = "bicubic"  # EVA's file is of 224 px, and MiniGPT-v2 brings it to 448 in this way
    task = "caption" if args.stage == 1 else "vqa"
    asked = common_prompts.pefomed(task, as_released=args.strict_repro)
    protocol = "open" if args.stage == 1 else "vqa"
    common_systems.texts(c, args, common_prompts.pefomed(task), asked=asked, resize="bicubic", protocol=protocol)
    c.lora = common_systems.lora(args, "llm/layers/attn/qkv_einsum/w:[qv]", rank=64, alpha=16, dropout=0.05)
    c.optax = dict(b2=0.999)
    length = dict(steps=_STEPS, warmup=_WARMUP[args.stage] / _STEPS)
    common_systems.recipe(c, args, lr=1e-5, wd=0.05, **length, decay="cosine", trained="connector/proj/.*")
    return c
