"""MedGemma 4B adapted to questions about radiological images, in the form of Google's fine-tuning notebook.

    export GEMMA3_TOKENIZER=/weights/medgemma-4b-it/tokenizer.model
    python -m paligemma_med.train --config=configs/medgemma_4b.py:init=/weights/medgemma-4b-it --workdir=out/medgemma

`version` is "1.5" (default) or "1.0": same parts and names, other order of question and image. Weights of 1.0 are to be
those of July 2025 or later (1.0.1): before, the end of an image had no token.

From the notebook (Google-Health/medgemma): LoRA of rank 16, alpha 16, dropout .05 on all linear layers of decoder and
tower, not on the projector (38,497,792 parameters); learning rate 2e-4, linear with 3 % warm-up; 4 examples and 4
accumulated; gradients clipped at .3; 1 epoch. Not from it: only the answer is learnt (`learns_all` also trains on
question and template, as it does, with the mean over tokens); the frozen weights are bfloat16, where it has NF4
(`--config.frozen_dtype=nf4`); its embedding table and output layer, 671 million parameters each, stay frozen; data,
since its own are tiles of colon cancer. SLAKE is among MedGemma's own training data (its card), VQA-RAD among their
sources.

A published model is asked as it is with `evaluate --config=… --checkpoint=…`. 1.5 may think before it answers, which
its card gives 2,000 tokens for (`max_new_tokens`).

Arguments: version, system (instructions before the question; 1.0 only), learns_all, projector (True trains it, too),
and those in configs/common_systems.py.
"""

from ml_collections import ConfigDict

from configs import common_prompts, common_systems


def get_config(arg=None) -> ConfigDict:
    args = common_systems.parse_arg(arg, version="1.5", system="", learns_all=False, projector=False)
    c = common_systems.make(args, "medgemma_4b", "gemma3", res=896, text_len=128)
    prompt = common_prompts.medgemma(args.version, system=args.system, learns_all=args.learns_all)
    common_systems.texts(c, args, prompt)
    c.loss_norm = "token" if args.learns_all else "example"
    c.lora = common_systems.lora(args, ("connector/.*", None), ".*", rank=16, alpha=16, dropout=0.05)
    c.grad_clip_norm = 0.3
    trained = "connector/.*" if args.projector else ""
    common_systems.recipe(c, args, lr=2e-4, epochs=1.0, decay="linear", trained=trained)
    return c
