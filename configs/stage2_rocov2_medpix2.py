"""Stage 2 of the paper on ROCOv2 enriched with MedPix 2.0, the paper's annealing mixture.

    python -m paligemma_med.train --config=configs/stage2_rocov2_medpix2.py:stage1=out/stage1 \
        --workdir=out/stage2

Section 4.3 brings a small set of high quality into a large one "incrementally" and gives no
proportions. Here `medpix` is the share of MedPix among all examples: by default 0.15, which is
about what putting the two sets in one pile gives (11,574 of the authors' 77 thousand questions).
With `anneal` (the default) it comes in by thirds of training: none, that share, twice that share.
Without, the share is constant; both see as many examples of either set.
With `version=v1` the large set is ROCO v1, as in the authors' files.
Arguments: medpix, anneal, version, stage1 or init, and the variants of configs/common_3b.py.
"""

from configs import common_3b


def _mixture(args):
    if not 0 < args.medpix < (0.5 if args.anneal else 1):
        raise ValueError(f"medpix={args.medpix}: expected a share above 0, below 0.5 with anneal.")

    def weights(medpix):
        return dict(rocov2=1 - medpix, medpix2=medpix)

    if not args.anneal:
        return weights(args.medpix), None
    return weights(0.0), [(1 / 3, weights(args.medpix)), (2 / 3, weights(2 * args.medpix))]


def get_config(arg=None):
    return common_3b.stage2(
        arg,
        lambda args: dict(rocov2=common_3b.roco(args), medpix2="medpix2/qa"),
        mixture=_mixture,
        epochs=9,
        text_len=256,
        max_new_tokens=128,
        medpix=0.15,
        anneal=True,
        version="v2",
    )
