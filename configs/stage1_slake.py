"""Stage 1 of the paper: the projection head alone, on SLAKE (section 4.4 and table 3).

    python -m paligemma_med.train --config=configs/stage1_slake.py:init=/weights/mix_448.npz \
        --workdir=out/stage1

The paper gives: 5 epochs, learning rate 1e-5 constant, label smoothing 0, weight decay 0, batch 6
with 16 accumulated (96 in effect), fp16. Here frozen weights and activations are bfloat16, which
has float32's range, and what is trained stays float32.

Arguments: init (weights; any form `model_init` takes; the paper's are PaliGemma-3B-mix-448), base (paligemma_3b,
the paper's, or PaliGemma 2 in its recipe: paligemma2_3b, paligemma2_10b, paligemma2_28b), res,
lang (en, zh or all), micro (examples in a micro-batch), accum (micro-batches in a step) and tiny
(the tiny base model of configs/tiny_base.py, to try out data and commands).
"""

from ml_collections import ConfigDict

from configs import common, common_3b, tiny_base


def get_config(arg=None) -> ConfigDict:
    args = common.parse_arg(arg, init="", base="paligemma_3b", res=448, lang="en", micro=6, accum=16, tiny=False)
    c = ConfigDict()
    c.seed = 0
    if args.tiny:
        tiny_base.apply(c)
    else:
        common_3b.model(c, args.res, args.base)
    c.model_init = common.path_or_none(args.init or (tiny_base.BASE if args.tiny else None))
    # Measured on all of SLAKE, en and zh: prompts take 26 tokens at most, answers 25, both 45.
    c.text_len = 64
    c.supervised_len = 32  # logits are computed at this many positions

    name = f"slake/{args.lang}"
    # The prompt tells PaliGemma the language of the answer. With both languages each row gives its own,
    # and `predict`, which has no rows, asks in English.
    both = args.lang == "all"
    prompt = common.prompt_for("{q_lang}" if both else args.lang)
    predict_prompt = common.prompt_for("en" if both else args.lang)
    c.input = dict(
        data=common.dataset(name, "train"),
        pp=common.train_pp(c.res, c.text_len, c.tokenizer, prompt=prompt),
        num_workers=0 if args.tiny else 4,
    )
    c.predict_pp = common.eval_pp(c.res, c.text_len, c.tokenizer, keep=(), prompt=predict_prompt)
    c.total_epochs = 5.0
    common_3b.recipe(c, args.micro, args.accum, lr=1e-5)
    c.schedule = [("img/head/.*", dict(decay_type="constant")), (".*", None)]

    c.log_training_steps = 5
    c.evals = {}
    c.evals["slake_validate"] = common.vqa_eval(
        c, name, "validate", text_len=48, max_new_tokens=32, prompt=prompt, log_epochs=1.0
    )
    c.evals["slake_validate_loss"] = common.loss_eval(c, name, "validate", prompt=prompt, log_epochs=1.0)
    return c
