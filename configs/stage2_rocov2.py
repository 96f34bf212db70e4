"""Stage 2 of the paper on ROCOv2: LoRA in both towers, questions synthesised from captions.

    python -m paligemma_med.train --config=configs/stage2_rocov2.py:stage1=out/stage1 \
        --workdir=out/stage2

Data: `rocov2/qa`, or with `version=v1` `roco_v1/qa`: by the ids in the authors' files, what the paper
calls ROCO v2.0 is v1.
Arguments: version, letters, stage1 or init, and the variants that configs/common_3b.py lists.
"""

from ml_collections import ConfigDict

from configs import common, common_3b
from paligemma_med.pp import rows


def get_config(arg=None) -> ConfigDict:
    args = common_3b.parse_arg(arg, epochs=7.0, version="v2", letters=False)
    c = common_3b.stage2(args)
    c.text_len = 256  # answers come from captions: 20 words on average, a few over 200

    name = common_3b.roco(args.version)
    prompt = common_3b.prompt_for(args, options=args.letters)
    answer = rows.ANSWER_LETTER if args.letters else "answer"
    c.input.data = common.dataset(name, "train", args.data_dir)
    c.input.pp = common.train_pp(c.res, c.text_len, c.tokenizer, prompt=prompt, answer=answer)
    c.predict_pp = common.eval_pp(c.res, c.text_len, c.tokenizer, keep=(), prompt=prompt)

    evaluation = common.multiple_choice_eval if args.letters else common.open_eval
    c.evals = {}
    c.evals.rocov2_validate = evaluation(
        c,
        name,
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
    c.evals.rocov2_validate_loss = common.loss_eval(
        c,
        name,
        "validate",
        data_dir=args.data_dir,
        prompt=prompt,
        answer=answer,
        keep=common_3b.EVAL_KEYS,
        log_epochs=1.0,
    )
    return c
