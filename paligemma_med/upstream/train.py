"""A config of ours on big_vision's own trainer.

    BIG_VISION_DIR=~/big_vision python -m paligemma_med.upstream.train \
        --config=configs/slake_mini.py --workdir=out/bv

The loop, the data reader and the optimizer are big_vision's (trainers/proj/paligemma/train.py); the
config file, the model, the evaluators and the data sets are ours. Flags are those of big_vision's
trainer.
"""
