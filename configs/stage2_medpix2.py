"""Stage 2 of the paper on MedPix 2.0: LoRA in both towers, questions synthesised from cases.

    python -m paligemma_med.train --config=configs/stage2_medpix2.py:stage1=out/stage1 \
        --workdir=out/stage2

Data: `medpix2/qa`, by the official split of cases (the authors made their own, unseeded).
Arguments: letters, stage1 or init, and the variants that configs/common_3b.py lists and explains.
"""

from ml_collections import ConfigDict

from configs import common, common_3b
from paligemma_med.pp import rows


def get_config(arg=None) -> ConfigDict:
    args = common_3b.parse_arg(arg, epochs=4.0, letters=False)
    c = common_3b.stage2(args)
    c.text_len = 256  # answers have 21 words on average and 77 at most

    prompt = common_3b.prompt_for(args, options=args.letters)
    answer = rows.ANSWER_LETTER if args.letters else "answer"
    c.input.data = common.dataset("medpix2/qa", "train", args.data_dir)
    c.input.pp = common.train_pp(c.res, c.text_len, c.tokenizer, prompt=prompt, answer=answer)
    c.predict_pp = common.eval_pp(c.res, c.text_len, c.tokenizer, keep=(), prompt=prompt)

    evaluation = common.multiple_choice_eval if args.letters else common.open_eval
    c.evals = {}
    c.evals.medpix2_validate = evaluation(
        c,
        "medpix2/qa",
        "validate",
        data_dir=args.data_dir,
        text_len=c.text_len,
        max_new_tokens=128,
        prompt=prompt,
        answer=answer,
        keep=common_3b.EVAL_KEYS,
        samples=args.samples,
        log_epochs=1.0,
    )
    c.evals.medpix2_validate_loss = common.loss_eval(
        c,
        "medpix2/qa",
        "validate",
        data_dir=args.data_dir,
        prompt=prompt,
        answer=answer,
        keep=common_3b.EVAL_KEYS,
        log_epochs=1.0,
    )
    return c
