"""System 002 (arXiv 2504.05575): BiomedCLIP's tower and LLaMA-3 8B, adapted together in two stages on OmniMedVQA.

    python -m data_prep.build omnimedvqa --manual_dir ~/data/OmniMedVQA
    export BPE_TOKENIZER=/weights/Meta-Llama-3-8B/tokenizer.json
    python -m paligemma_med.train --workdir=out/llama1 \\
        --config=configs/llama_clip.py:stage=1,img=/weights/BiomedCLIP,llm=/weights/Meta-Llama-3-8B
    python -m paligemma_med.train --workdir=out/llama2 --config=configs/llama_clip.py:stage=2,init=out/llama1
    python -m paligemma_med.evaluate --workdir=out/llama2 --out=out/test \\
        --config=configs/llama_clip.py:stage=2,split=test

From the paper's abstract and two of its figures, all that was to be had: the two parts, LoRA, two stages, "separate
fine-tuning of image and text encoders" before the joint one, OmniMedVQA's questions without their options. Its 73.4 %
has no rule: here exact match is beside OmniMedVQA's QA-score, which looks up the option that is nearest to the answer.
Everything else is not from the paper:

features   patches of block 11 of 12, without norm and class token, as LLaVA-Med reads BiomedCLIP
connector  "linear" (default), 768 to 4096; "mlp": two layers with a GELU between, as LLaVA-1.5's
LoRA       rank 16, alpha 32, dropout .05: q, k, v, output of the tower in stage 1, of the decoder, too, in stage 2
stages     1: connector and the tower's adapters; 2: connector and all adapters; both on the same questions
schedule   cosine with 3 % warm-up, 2e-4 and 1e-4, 1 and 3 epochs, 64 examples
prompt     BOS, image, "{question}\\nAnswer:", " {answer}", EOS; base weights, no chat template
images     224 px, bicubic, which the tower was trained with; not cut to a square
data       OmniMedVQA's open part (88,996 of 127,995 questions), a split drawn by image, since it is released without

While training, `validate` is asked each epoch, at the end once more with the options, for the QA-score and the
likelihoods (`choices=False` leaves this out; it needs config `open_access`, which a build makes beside the other).

Arguments: stage, link (linear or mlp), split (of evaluations), choices, and those in configs/common_systems.py.
"""

from ml_collections import ConfigDict

from configs import common, common_prompts, common_systems

_DATA = "omnimedvqa/open_access_open"
_LR, _EPOCHS = {1: 2e-4, 2: 1e-4}, {1: 1.0, 2: 3.0}
_TOWER, _DECODER = "img/.*MultiHeadDotProductAttention_0/.*", "llm/layers/attn/.*"
_LINKS = {"linear": None, "mlp": dict(kind="projector", hidden=4096)}


def get_config(arg=None) -> ConfigDict:
    args = common_systems.parse_arg(
        arg, stage=1, link="linear", data=_DATA, split="validate", choices=True, micro=8, accum=8
    )
    if args.stage not in _LR:
        raise ValueError(f"Config argument stage={args.stage}: expected 1 or 2.")
    if args.link not in _LINKS:
        raise ValueError(f"Config argument link={args.link!r}: expected one of {sorted(_LINKS)}.")
    c = common_systems.make(args, "llama_clip", "bpe", res=224, text_len=96, doc=__doc__)
    if args.link == "mlp":
        c.model.connector = _LINKS["mlp"] | (dict(hidden=32) if args.tiny else {})
    prompt = common_prompts.llama_clip()
    common_systems.texts(c, args, prompt, resize="bicubic", protocol="open", split=args.split)
    if args.choices and args.data.startswith("omnimedvqa/") and args.data.endswith("_open"):
        _add_choices(c, args, prompt)
    c.lora = common_systems.lora(args, _TOWER, _DECODER, rank=16, alpha=32, dropout=0.05)
    c.grad_clip_norm = 1.0
    trained = "img/head/.*" if args.link == "linear" else "connector/.*"
    lr, epochs = _LR[args.stage], _EPOCHS[args.stage]
    # Stage 1 has the decoder's adapters, too, which change nothing before they are trained: stage 2 goes on from all.
    adapters = "img/.*/lora_[ab]" if args.stage == 1 else ".*/lora_[ab]"
    common_systems.recipe(c, args, lr=lr, epochs=epochs, decay="cosine", trained=trained, adapters=adapters)
    return c


def _add_choices(c, args, prompt):
    """The same questions and images once more, at the end of training: asked without their options, scored with
    them. A section by itself, since rows whose options don't tell the answer are in the open set alone."""
    c.evals[f"omnimedvqa_{args.split}_choices"] = common.multiple_choice_eval(
        c,
        args.data.removesuffix("_open"),
        args.split,
        data_dir=args.data_dir,
        text_len=c.text_len,
        max_new_tokens=args.max_new_tokens,
        prompt=prompt,
        answer="answer",
        samples=args.samples,
        resize="bicubic",
        batch_size=16,
    )
