"""The tiny base model: a PaliGemma of 1.8 million parameters, from scratch on drawn shapes.

`python -m tools.pretrain_tiny` runs it and writes tools/tiny_base.npz, from which the quickstart
starts: what PaliGemma's own pre-training is to the real thing. It has seen circles and squares and
no medical picture; it can spell words, radiology's among them. It learns in three lessons: single
shapes, since from the mixture of all pictures and questions a model with random weights takes very
long to find out that there is something to look at; the mixture; and words to say besides.

Arguments: lesson, init (weights; a lesson is given the workdir of the one before), epochs and lr (0:
those of the lesson), size (of a batch), seed, eval (the split that evaluations use), data_dir.
"""

import os

from ml_collections import ConfigDict

from configs import common

# The weights, once they are made.
BASE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "tools", "tiny_base.npz")

# The architecture. Loops are unrolled and nothing is computed twice: 2.5 times faster on a CPU than
# scan.
_CPU = dict(scan=False, remat_policy="none")
MODEL = dict(
    img=dict(variant="mu/16", width=128, depth=6, mlp_dim=384, num_heads=4, **_CPU),
    llm=dict(variant="gemma_mini", width=128, depth=4, mlp_dim=256, head_dim=32, **_CPU),
)
RES = 64
TOKENIZER = "tiny"
DATA = {1: "shapes_easy", 2: "shapes", 3: "shapes_words"}
EPOCHS = {1: 1.2, 2: 1.3, 3: 1.0}
LR = {1: 2e-3, 2: 2e-3, 3: 2e-3}


def apply(c) -> None:
    """Makes this the model of `c`: res, tokenizer and model. Its weights are `BASE`."""
    c.res = RES
    c.tokenizer = TOKENIZER
    c.model = MODEL


def get_config(arg=None) -> ConfigDict:
    args = common.parse_arg(arg, lesson=1, init="", epochs=0.0, lr=0.0, size=32, seed=0, eval="test", data_dir="")
    if args.lesson not in DATA:
        raise ValueError(f"Config argument lesson={args.lesson}: expected 1, 2 or 3.")
    data = DATA[args.lesson]
    c = ConfigDict()
    c.seed = args.seed
    apply(c)
    c.model_init = common.path_or_none(args.init)
    c.text_len = 29  # the longest question with its answer takes 30
    c.supervised_len = 16

    c.input = dict(
        data=common.dataset(data, "train", args.data_dir),
        pp=common.train_pp(c.res, c.text_len, c.tokenizer),
        batch_size=args.size,
        num_threads=1,
        on_error="error",
    )
    c.predict_pp = common.eval_pp(c.res, 64, c.tokenizer, keep=())
    # Descriptions hold more to learn than a yes: each token counts the same.
    c.loss_norm = "token"
    c.total_epochs = args.epochs or EPOCHS[args.lesson]

    c.optax_name = "scale_by_adam"
    c.optax = dict(b2=0.95)
    c.lr = args.lr or LR[args.lesson]
    c.wd = 0.1 * c.lr
    c.wd_mults = [(".*/(kernel|w|gating_einsum|linear)", 1.0)]
    c.grad_clip_norm = 1.0
    c.schedule = dict(decay_type="cosine", warmup_percent=0.05)

    c.log_training_steps = 50
    c.ckpt_percent = 0.1
    c.update(common.LOOP)
    c.evals = {}
    c.evals[f"{data}_{args.eval}"] = common.vqa_eval(
        c, data, args.eval, text_len=c.text_len, max_new_tokens=16, batch_size=128, data_dir=args.data_dir
    )
    c.evals[f"{data}_{args.eval}_loss"] = common.loss_eval(c, data, args.eval, batch_size=128, data_dir=args.data_dir)
    return c
