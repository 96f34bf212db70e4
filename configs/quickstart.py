"""The quickstart: the tiny base model, which has seen no radiology, adapted to the phantoms.

`python -m tools.quickstart` runs it. Minutes on two cores; the same loop, data path and evaluation
as the real thing.

Arguments: init (weights; "" starts from random ones), epochs, lr, size (of a batch), seed, eval
(the split that evaluations use; settings were chosen on validate), data_dir.
"""

import os

from configs import common, tiny_base

BASE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "tools", "tiny_base.npz")


def get_config(arg=None):
    args = common.parse_arg(
        arg, init=BASE, epochs=11.0, lr=1e-3, size=32, seed=0, eval="test", data_dir=""
    )
    c = common.ml_collections.ConfigDict()
    c.seed = args.seed
    c.res = tiny_base.RES
    c.text_len = 28  # the longest question with its answer takes 25
    c.supervised_len = 8
    c.tokenizer = tiny_base.TOKENIZER
    c.model = tiny_base.MODEL
    c.model_init = args.init or None

    where = dict(data_dir=args.data_dir) if args.data_dir else {}
    c.input = dict(
        data=dict(name="phantom", split="train", **where),
        pp=common.train_pp(c.res, c.text_len, c.tokenizer),
        batch_size=args.size,
        num_threads=1,
    )
    c.predict_pp = common.eval_pp(c.res, 64, c.tokenizer, keep=())
    c.total_epochs = args.epochs

    c.optax_name = "scale_by_adam"
    c.optax = dict(b2=0.95)
    c.lr = args.lr
    c.wd = 0.1 * args.lr
    c.wd_mults = [(".*/(kernel|w|gating_einsum|linear)", 1.0)]
    c.grad_clip_norm = 1.0
    c.schedule = dict(decay_type="cosine", warmup_percent=0.05)

    c.log_training_steps = 50
    c.ckpt_percent = 0.25
    name = f"phantom_{args.eval}"
    c.evals = {}
    c.evals[name] = common.vqa_eval(
        c, "phantom", args.eval, text_len=c.text_len, max_new_tokens=12, batch_size=128
    )
    for key in ("data", "train_data"):
        c.evals[name][key].update(where)
    return c
