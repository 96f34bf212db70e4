"""MedGemma 4B adapted to questions about radiological images: our recipe, or that of Google's fine-tuning notebook.

    export GEMMA3_TOKENIZER=/weights/medgemma-4b-it/tokenizer.model
    python -m paligemma_med.train --config=configs/medgemma_4b.py:init=/weights/medgemma-4b-it --workdir=out/medgemma
    python -m paligemma_med.train --workdir=out/google \\
        --config=configs/medgemma_4b.py:recipe=google,init=/weights/medgemma-4b-it

`version` is "1.5" (default) or "1.0": same parts and names, other order of question and image. Weights of 1.0 are to be
those of July 2025 or later (1.0.1): before, the end of an image had no token.

From the notebook (Google-Health/medgemma), in both recipes: LoRA of rank 16, alpha 16, dropout .05 on all linear layers
of decoder and tower, not on the projector (38,497,792 parameters); learning rate 2e-4, linear with 3 % warm-up; 4
examples and 4 accumulated; gradients clipped at .3; 1 epoch. `recipe=google` also has its frozen weights in NF4, and
learns question and template, too, with the mean over tokens. Not from it: in `recipe=ours`, the default, only the
answer is learnt, each example's mean counts the same, and frozen weights are bfloat16; in both, embedding table and
output layer, 671 million parameters each, stay frozen (it trains copies of them); data, since its own are tiles of
colon cancer.

SLAKE is among MedGemma's own training data (its card), VQA-RAD among their sources. A published model is asked as it is
with `evaluate --config=… --checkpoint=…`. 1.5 may think before it answers, which its card gives 2,000 tokens for
(`max_new_tokens`).

Arguments: version, recipe (ours or google), data (slake/en, vqa_rad/public, and stage 2's: rocov2/qa, roco_v1/qa,
medpix2/qa, pmc_vqa/v1_open; pmc_vqa/v1 has options in the prompt and learns the letter), system (instructions before
the question; 1.0 only), learns_all (as Google's, by itself), projector (True trains it, too), and those in
configs/common_systems.py.
"""

from ml_collections import ConfigDict

from configs import common_prompts, common_systems

# Sets of long answers, and those with four options.
_OPEN, _CHOICES = (
    ("rocov2/", "roco_v1/", "medpix2/", "pmc_vqa/v1_open", "pmc_vqa/v2_open"),
    ("pmc_vqa/v1", "pmc_vqa/v2"),
)


def get_config(arg=None) -> ConfigDict:
    args = common_systems.parse_arg(arg, version="1.5", recipe="ours", system="", learns_all=False, projector=False)
    if args.recipe not in ("ours", "google"):
        raise ValueError(f"Config argument recipe={args.recipe!r}: expected 'ours' or 'google'.")
    google = args.recipe == "google"
    learns_all = args.learns_all or google
    choices, is_open = args.data in _CHOICES, args.data.startswith(_OPEN)
    text_len = 256 if choices or is_open else 128
    c = common_systems.make(args, "medgemma_4b", "gemma3", res=896, text_len=text_len, doc=__doc__)
    prompt = common_prompts.medgemma(args.version, system=args.system, learns_all=learns_all, options=choices)
    common_systems.texts(c, args, prompt, protocol="open" if is_open else "vqa", choices=choices)
    c.loss_norm = "token" if learns_all else "example"
    if google:
        c.frozen_dtype = "nf4"
    c.lora = common_systems.lora(args, ("connector/.*", None), ".*", rank=16, alpha=16, dropout=0.05)
    c.grad_clip_norm = 0.3
    trained = "connector/.*" if args.projector else ""
    common_systems.recipe(c, args, lr=2e-4, epochs=1.0, decay="linear", trained=trained)
    return c
