"""The quickstart's two stages and a training of everything, small enough to be compared step by
step with big_vision's trainer: no dropout (its random numbers differ), no evals, 20 steps.

Arguments: stage (1: the head; 2: LoRA in both towers; 3: all, with decay, multipliers and
smoothing), init (weights), small (False: the quickstart's own
model, and room for SLAKE's texts).
"""

from configs import common, quickstart

BATCH = 8
STEPS = 20
_SMALL = dict(width=32, depth=2, mlp_dim=48, scan=True)


def get_config(arg=None):
    args = common.parse_arg(arg, stage=1, init="", small=True)
    c = quickstart.get_config(f"stage={min(args.stage, 2)},rank=4")
    if args.small:
        c.model.img.update(**_SMALL, num_heads=2)
        c.model.llm.update(**_SMALL, head_dim=16)
    else:
        c.text_len, c.supervised_len = 40, 24
    c.model_init = args.init or None
    c.input.batch_size = BATCH
    c.input.data = dict(name="from_data_dir", split="train")  # nobody looks for it
    c.evals = {}
    if args.stage == 3:
        c.lora = None
        c.wd = 1e-3
        c.wd_mults = [(".*/(kernel|w|gating_einsum|linear)", 1.0), (".*/bias", 0.5)]
        c.lr_mults = [("img/.*", 0.5), (".*", 1.0)]
        c.label_smoothing = 0.1
        c.schedule = [
            ("img/pos_embedding", None),
            ("img/.*", dict(decay_type="linear", linear_end=0.1)),
            ("llm/.*", dict(decay_type="cosine", warmup_steps=5)),
        ]
    del c["total_epochs"], c["ckpt_percent"]
    c.total_steps = STEPS
    c.log_training_steps = 1
    c.ckpt_steps = STEPS
    c.compilation_cache = False
    return c
