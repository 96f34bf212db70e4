"""Stage 2 of the paper on ROCOv2: LoRA in both towers, questions synthesised from captions.

    python -m paligemma_med.train --config=configs/stage2_rocov2.py:stage1=out/stage1 \
        --workdir=out/stage2

Data: `rocov2/qa`, or with `version=v1` `roco_v1/qa`: what the paper calls ROCO v2.0 is v1 by the
ids in the authors' files.
Arguments: version, letters, stage1 or init, and the variants that configs/common_3b.py lists.
"""

from configs import common_3b


def get_config(arg=None):
    # Answers come from captions: 20 words on average, a few over 200.
    return common_3b.stage2(
        arg,
        lambda args: dict(rocov2=common_3b.roco(args)),
        epochs=7,
        text_len=256,
        max_new_tokens=128,
        version="v2",
        **common_3b.LETTERS,
    )
