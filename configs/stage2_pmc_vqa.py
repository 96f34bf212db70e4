"""Stage 2 of the paper on PMC-VQA: LoRA in both towers, multiple choice.

    python -m paligemma_med.train --config=configs/stage2_pmc_vqa.py:stage1=out/stage1 \
        --workdir=out/stage2

The four options are in the prompt. `answer=letter` (default) trains and scores the letter, one
unambiguous token; `answer=text` the option itself, which the paper's ROUGE rows would need. `version`
is v1 (the paper's 227K pairs) or v2; v1_open and v2_open have the questions without their options,
and answers as text.
Arguments: answer, version, stage1 or init, and the variants that configs/common_3b.py lists.
"""

from ml_collections import ConfigDict

from configs import common, common_3b
from paligemma_med.pp import rows

_ANSWERS = {"letter": rows.ANSWER_LETTER, "text": "answer"}


def get_config(arg=None) -> ConfigDict:
    args = common_3b.parse_arg(arg, epochs=4.0, version="v1", answer="letter")
    c = common_3b.stage2(args)
    c.text_len = 192

    name = f"pmc_vqa/{args.version}"
    is_open = args.version.endswith("_open")
    if not is_open and args.answer not in _ANSWERS:
        raise ValueError(f"answer={args.answer!r}: expected one of {sorted(_ANSWERS)}.")
    prompt = common_3b.prompt_for(args, options=not is_open)
    answer = "answer" if is_open else _ANSWERS[args.answer]
    c.input.data = common.dataset(name, "train", args.data_dir)
    c.input.pp = common.train_pp(c.res, c.text_len, c.tokenizer, prompt=prompt, answer=answer)
    c.predict_pp = common.eval_pp(c.res, c.text_len, c.tokenizer, keep=(), prompt=prompt)

    evaluation = common.open_eval if is_open else common.multiple_choice_eval
    c.evals = {}
    c.evals.pmc_vqa_validate = evaluation(
        c,
        name,
        "validate",
        data_dir=args.data_dir,
        text_len=c.text_len,
        max_new_tokens=48,
        prompt=prompt,
        answer=answer,
        keep=common_3b.EVAL_KEYS,
        samples=args.samples,
        log_epochs=1.0,
    )
    c.evals.pmc_vqa_validate_loss = common.loss_eval(
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
