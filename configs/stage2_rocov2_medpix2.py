"""Stage 2 of the paper on ROCOv2 enriched with MedPix 2.0, the paper's annealing mixture.

    python -m paligemma_med.train --config=configs/stage2_rocov2_medpix2.py:stage1=out/stage1 \
        --workdir=out/stage2

Section 4.3 brings a small set of high quality into a large one, and gives no proportions. Here
`medpix` is the share of MedPix among the examples: by default 0.15, which is about what putting the
two sets in one pile gives (11,574 of the authors' 77 thousand questions).
Arguments: medpix, stage1 or init, and the variants that configs/common_3b.py lists and argues.
"""

from configs import common_3b


def _sets(args):
    if not 0 < args.medpix < 1:
        raise ValueError(f"medpix={args.medpix}: expected a share between 0 and 1.")
    return {"rocov2": ("rocov2/qa", 1 - args.medpix), "medpix2": ("medpix2/qa", args.medpix)}


def get_config(arg=None):
    return common_3b.stage2(arg, _sets, epochs=9, text_len=256, supervised_len=128, medpix=0.15)
