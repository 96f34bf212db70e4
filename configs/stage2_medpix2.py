"""Stage 2 of the paper on MedPix 2.0: LoRA in both towers, questions synthesised from cases.

    python -m paligemma_med.train --config=configs/stage2_medpix2.py:stage1=out/stage1 \
        --workdir=out/stage2

Data: `medpix2/qa`, by the official split of cases (the authors made their own, unseeded).
Arguments: letters, stage1 or init, and the variants that configs/common_3b.py lists and argues.
"""

from configs import common_3b


def get_config(arg=None):
    # Answers have 21 words on average and 77 at most.
    return common_3b.stage2(
        arg,
        dict(medpix2="medpix2/qa"),
        epochs=4,
        text_len=256,
        max_new_tokens=128,
        **common_3b.LETTERS,
    )
