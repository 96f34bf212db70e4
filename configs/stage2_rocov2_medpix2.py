"""Stage 2 of the paper on ROCOv2 enriched with MedPix 2.0, the paper's annealing mixture.

    python -m paligemma_med.train --config=configs/stage2_rocov2_medpix2.py:stage1=out/stage1 \
        --workdir=out/stage2

Section 4.3 mixes a small set of high quality into a large one "incrementally" and gives no
proportions. Here `medpix` is the share of MedPix among all examples: by default 0.15, which is
about its share if the two sets are simply joined (11,574 of the authors' 77 thousand questions).
With `anneal` (the default) it grows by thirds of training: none, that share, twice that share.
Without it the share is constant; the number of examples from each set is the same.
With `version=v1` the large set is ROCO v1, as in the authors' files.
Arguments: medpix, anneal, version, stage1 or init, and the variants of configs/common_3b.py.
"""

from ml_collections import ConfigDict

from configs import common, common_3b


def _shares(medpix):
    return dict(rocov2=1 - medpix, medpix2=medpix)


def get_config(arg=None) -> ConfigDict:
    args = common_3b.parse_arg(arg, epochs=9.0, medpix=0.15, anneal=True, version="v2")
    if not 0 < args.medpix < (0.5 if args.anneal else 1):
        raise ValueError(f"medpix={args.medpix}: expected a share above 0, below 0.5 with anneal.")
    c = common_3b.stage2(args)
    c.text_len = 256  # as for each of the two sets

    sets = dict(rocov2=common_3b.roco(args.version), medpix2="medpix2/qa")
    if args.anneal:
        c.input.data = _shares(0.0)
        c.input.anneal = [(1 / 3, _shares(args.medpix)), (2 / 3, _shares(2 * args.medpix))]
    else:
        c.input.data = _shares(args.medpix)
    for key, name in sets.items():
        c.input[key] = dict(data=common.dataset(name, "train", args.data_dir))
    prompt = common_3b.prompt_for(args)
    c.input.pp = common.train_pp(c.res, c.text_len, c.tokenizer, prompt=prompt)
    c.predict_pp = common.eval_pp(c.res, c.text_len, c.tokenizer, keep=(), prompt=prompt)

    c.evals = {}
    for key, name in sets.items():
        c.evals[f"{key}_validate"] = common.open_eval(
            c,
            name,
            "validate",
            data_dir=args.data_dir,
            text_len=c.text_len,
            max_new_tokens=128,
            prompt=prompt,
            keep=common_3b.EVAL_KEYS,
            samples=args.samples,
            log_epochs=1.0,
        )
        c.evals[f"{key}_validate_loss"] = common.loss_eval(
            c,
            name,
            "validate",
            data_dir=args.data_dir,
            prompt=prompt,
            keep=common_3b.EVAL_KEYS,
            log_epochs=1.0,
        )
    return c
