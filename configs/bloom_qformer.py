"""System 003 (arXiv 2404.16192): BiomedCLIP's tower, a query transformer, and RadBloomz 7B.

    python -m data_prep.build pmc_oa --config=split_captions --manual_dir ~/data/pmc_oa
    python -m data_prep.build pmc_vqa --config=v1_open --manual_dir ~/data/PMC-VQA         # and slake, vqa_rad
    export BPE_TOKENIZER=/weights/bloomz-7b1/tokenizer.json
    python -m paligemma_med.train --workdir=out/bloom1 \\
        --config=configs/bloom_qformer.py:stage=1,img=/weights/BiomedCLIP,llm=/weights/bloomz-7b1
    python -m paligemma_med.train --workdir=out/bloom2 --config=configs/bloom_qformer.py:stage=2,init=out/bloom1
    python -m paligemma_med.train --workdir=out/bloom3 --config=configs/bloom_qformer.py:stage=3,init=out/bloom2
    python -m paligemma_med.train --workdir=out/bloom3_rad \\
        --config=configs/bloom_qformer.py:stage=3,data=vqa_rad/public,init=out/bloom2
    python -m paligemma_med.evaluate --workdir=out/bloom3 --out=out/test \\
        --config=configs/bloom_qformer.py:stage=3,split=test

From the paper's abstract, all that was to be had: the parts, three stages (captions of PMC-OA, PMC-VQA, then VQA-RAD
or SLAKE), query transformer and LoRA trained, tower and language model frozen, loss on the answer. RadBloomz's weights
aren't public: bigscience/bloomz-7b1 takes their place. Everything else is not from the paper:

queries    32, of a BERT-base with cross-attention in every other layer (BLIP-2's), then a linear layer
features   all 197 tokens after the last norm, class token included (BLIP-2's)
LoRA       on query_key_value, rank 16, alpha 32, dropout .1 (MedVInT's alpha and dropout)
schedule   cosine with 3 % warm-up; 1e-4, 2e-5, 2e-5; 1, 3, 20 epochs; weight decay .05; 64 examples
prompt     stage 1 none, 2 and 3 image, "Question: {question} Answer:", " {answer}", EOS; no BOS, as BLOOM's tokenizer
images     224 px, bicubic, which the tower was trained with; not cut to a square
texts      160 tokens with captions, 96 with questions; what is cut is counted
data       PMC-OA's captions of subfigures, PMC-VQA v1 without its options, SLAKE in English

VQA-RAD comes without a validation split: our builder draws a tenth of train's images as `validate`.

Arguments: stage, data (by default that of the stage), split (of evaluations), and those in configs/common_systems.py.
"""

from ml_collections import ConfigDict

from configs import common_prompts, common_systems

_DATA = {1: "pmc_oa/split_captions", 2: "pmc_vqa/v1_open", 3: "slake/en"}
_TEXT, _PROTOCOL = {1: 160, 2: 96, 3: 96}, {1: "report", 2: "open", 3: "vqa"}
_LR, _EPOCHS = {1: 1e-4, 2: 2e-5, 3: 2e-5}, {1: 1.0, 2: 3.0, 3: 20.0}


def get_config(arg=None) -> ConfigDict:
    args = common_systems.parse_arg(arg, stage=1, data="", split="", micro=8, accum=8)
    if args.stage not in _DATA:
        raise ValueError(f"Config argument stage={args.stage}: expected 1, 2 or 3.")
    args.data = args.data or _DATA[args.stage]
    c = common_systems.make(args, "bloom_qformer", "bpe(size=250880)", res=224, text_len=_TEXT[args.stage], doc=__doc__)
    prompt, protocol = common_prompts.bloom_qformer(args.stage), _PROTOCOL[args.stage]
    common_systems.texts(c, args, prompt, resize="bicubic", protocol=protocol, split=args.split)
    c.lora = common_systems.lora(args, "llm/layers/attn/qkv/kernel", rank=16, alpha=32, dropout=0.1)
    c.grad_clip_norm = 1.0
    lr, epochs = _LR[args.stage], _EPOCHS[args.stage]
    common_systems.recipe(c, args, lr=lr, wd=0.05, epochs=epochs, decay="cosine", trained="connector/.*")
    return c
