"""The paper's recipe with other image towers, which its authors name as a limitation: one argument, everything else
the same.

    python -m paligemma_med.train --workdir=out/biomedclip1 \
        --config=configs/vision_ablation.py:tower=biomedclip_224,img=/weights/BiomedCLIP,llm=/weights/gemma-2b
    python -m paligemma_med.train --workdir=out/biomedclip2 \
        --config=configs/vision_ablation.py:tower=biomedclip_224,stage=2,init=out/biomedclip1
    python -m tools.report out/siglip_224 out/siglip_448 out/biomedclip2 out/eva2 --out=out/towers

`tower` is siglip_224, siglip_448 (default), biomedclip_224, eva_224 or eva_448, each with its own normalisation of
pixels; all are read after their last norm, without a class token, and joined to Gemma 2B by one linear layer. Stage 1
trains that layer on SLAKE as in the paper (5 epochs, 1e-5, 96 examples), stage 2 LoRA on the attention of tower and
decoder.

Not from the paper: that stage 2 is on SLAKE, too (4 epochs), so that one set and one table compare the towers; and
where weights start. A tower and Gemma that have never met need a new layer in between, which 1e-5 hardly moves in 5
epochs (`lr`). PaliGemma's own SigLIP has been trained with its Gemma: for a fair comparison give every tower as it was
before, SigLIP's included, and the same Gemma (`img`, `llm`), and no `init` in stage 1.

Towers differ in more than what they have seen: siglip 413 M parameters, biomedclip 86 M, eva 987 M; image tokens 256
and 1,024 by patches of 14, biomedclip's 196.

Arguments: tower, stage, and those in configs/common_systems.py. With tiny=True, models of a few thousand parameters at
random weights: its table says nothing about the towers.
"""

from ml_collections import ConfigDict

from configs import common, common_3b, common_systems

# Tower → its variant, and the resolution.
TOWERS = {
    "siglip_224": ("So400m/14", 224),
    "siglip_448": ("So400m/14", 448),
    "biomedclip_224": ("biomedclip_b/16", 224),
    "eva_224": ("eva_g/14", 224),
    "eva_448": ("eva_g/14", 448),
}
_EPOCHS = {1: 5.0, 2: 4.0}


def get_config(arg=None) -> ConfigDict:
    args = common_systems.parse_arg(arg, tower="siglip_448", stage=1, micro=6, accum=16, max_new_tokens=32)
    if args.tower not in TOWERS:
        raise ValueError(f"Config argument tower={args.tower!r}: expected one of {list(TOWERS)}.")
    if args.stage not in _EPOCHS:
        raise ValueError(f"Config argument stage={args.stage}: expected 1 or 2.")
    variant, res = TOWERS[args.tower]
    c = common_systems.make(args, "paligemma_3b", common.GEMMA, res=res, text_len=64, doc=__doc__)
    if args.tiny:
        c.res, c.model.img = common_systems.tiny_tower(args.tower.partition("_")[0], res)
    else:
        c.model.img = dict(variant=variant)
    if args.tower == "eva_448":
        c.resample_posemb = "bicubic"  # its file is of 224 px
    common_systems.texts(c, args, common.PROMPT)
    if args.stage == 2:
        c.lora = common_3b.lora(
            "attention", args.rank or 8, args.alpha or 32.0, 0.05 if args.dropout < 0 else args.dropout
        )
    trained, adapters = ("img/head/.*", "") if args.stage == 1 else ("", ".*/lora_[ab]")
    common_systems.recipe(
        c, args, lr=1e-5, epochs=_EPOCHS[args.stage], decay="constant", warmup=0.0, trained=trained, adapters=adapters
    )
    return c
