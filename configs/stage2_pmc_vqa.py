"""Stage 2 of the paper on PMC-VQA: LoRA in both towers, multiple choice.

    python -m paligemma_med.train --config=configs/stage2_pmc_vqa.py:stage1=out/stage1 \
        --workdir=out/stage2

The four options stand in the prompt. `answer=letter` (default) trains and scores the letter, one
token that leaves nothing to interpretation; `answer=text` the option itself, as the paper's ROUGE
rows would need. `version` is v1 (the paper's 227K pairs) or v2; v1_open and v2_open have the
questions without their options, and answers as text.
Arguments: answer, version, stage1 or init, and the variants that configs/common_3b.py lists.
"""

from configs import common_3b

_ANSWERS = {"letter": "answer_letter", "text": "answer"}


def _choices(args):
    return "" if args.version.endswith("_open") else common_3b.SHOWN


def _answer_key(args):
    if args.version.endswith("_open"):
        return "answer"
    if args.answer not in _ANSWERS:
        raise ValueError(f"answer={args.answer!r}: expected one of {sorted(_ANSWERS)}.")
    return _ANSWERS[args.answer]


def _protocol(args):
    return "open" if args.version.endswith("_open") else "multiple_choice"


def get_config(arg=None):
    return common_3b.stage2(
        arg,
        lambda args: dict(pmc_vqa=f"pmc_vqa/{args.version}"),
        epochs=4,
        text_len=192,
        max_new_tokens=48,
        choices=_choices,
        answer_key=_answer_key,
        protocol=_protocol,
        answer="letter",
        version="v1",
    )
