"""The quickstart: a tiny PaliGemma, pre-trained on simple pictures, adapted to the phantoms.

Small enough for minutes on two cores; the same loop, data path and evaluation as the real thing.

Arguments: init (weights; "" starts from random ones), stage (1: projection head alone; 0: all).
"""

import os

from configs import common

BASE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "tools", "tiny_base.npz")

# The tiny base's architecture, shared with the tool that pre-trains it.
MODEL = dict(
    img=dict(width=128, depth=4, mlp_dim=512, num_heads=4, patch_size=8, variant="mu/8",
             scan=False, remat_policy="none"),
    llm=dict(variant="gemma_mini", width=128, depth=4, mlp_dim=384, num_heads=4, num_kv_heads=1,
             head_dim=32, scan=False, remat_policy="none"),
)  # fmt: skip


def get_config(arg=None):
    args = common.parse_arg(arg, init=BASE, stage=0, data="phantom", epochs=6.0)
    c = common.ml_collections.ConfigDict()
    c.seed = 0
    c.res = 64
    c.text_len = 40
    c.tokenizer = "tiny"
    c.model = MODEL
    c.model_init = args.init or None

    c.input = dict(
        data=dict(name=args.data, split="train"),
        pp=common.train_pp(c.res, c.text_len, c.tokenizer),
        batch_size=32,
    )
    c.total_epochs = args.epochs
    c.optax_name = "scale_by_adam"
    c.optax = dict(b2=0.95)
    c.lr = 1e-3
    c.wd = 1e-4
    c.wd_mults = [(".*", 1.0)]
    c.grad_clip_norm = 1.0
    c.schedule = dict(decay_type="cosine", warmup_percent=0.05)
    c.log_training_steps = 25
    c.evals = {}
    return c
