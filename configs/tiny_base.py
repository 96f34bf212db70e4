"""The tiny base model: a PaliGemma of 1.5 million parameters, from scratch on drawn shapes.

`python -m tools.pretrain_tiny` runs it and writes tools/tiny_base.npz, from which the quickstart
starts: what PaliGemma's own pre-training is to the real thing. It has seen circles and squares and
nothing medical.

Arguments: epochs, lr, size (of a batch), seed, eval (the split that evaluations use), data_dir.
"""

from configs import common

# The architecture of the tiny base, here alone: configs/quickstart.py takes it from here. Loops
# are unrolled and nothing is computed twice: 2.5 times faster on a CPU than scan.
_CPU = dict(scan=False, remat_policy="none")
MODEL = dict(
    img=dict(variant="mu/16", width=128, depth=4, mlp_dim=384, num_heads=4, **_CPU),
    llm=dict(variant="gemma_mini", width=128, depth=4, mlp_dim=256, head_dim=32, **_CPU),
)
RES = 64
TOKENIZER = "tiny"


def get_config(arg=None):
    args = common.parse_arg(arg, epochs=0.8, lr=1e-3, size=32, seed=0, eval="test", data_dir="")
    c = common.ml_collections.ConfigDict()
    c.seed = args.seed
    c.res = RES
    c.text_len = 32  # the longest question with its answer takes 31
    c.supervised_len = 20
    c.tokenizer = TOKENIZER
    c.model = MODEL
    c.model_init = None

    where = dict(data_dir=args.data_dir) if args.data_dir else {}
    c.input = dict(
        data=dict(name="shapes", split="train", **where),
        pp=common.train_pp(c.res, c.text_len, c.tokenizer),
        batch_size=args.size,
        num_threads=1,
    )
    c.predict_pp = common.eval_pp(c.res, 64, c.tokenizer, keep=())
    # Descriptions hold more to learn than a yes: each token counts the same.
    c.loss_norm = "token"
    c.total_epochs = args.epochs

    c.optax_name = "scale_by_adam"
    c.optax = dict(b2=0.95)
    c.lr = args.lr
    c.wd = 0.1 * args.lr
    c.wd_mults = [(".*/(kernel|w|gating_einsum|linear)", 1.0)]
    c.grad_clip_norm = 1.0
    c.schedule = dict(decay_type="cosine", warmup_percent=0.05)

    c.log_training_steps = 50
    c.ckpt_percent = 0.1
    name = f"shapes_{args.eval}"
    c.evals = {}
    c.evals[name] = common.vqa_eval(
        c, "shapes", args.eval, text_len=c.text_len, max_new_tokens=20, batch_size=128
    )
    for key in ("data", "train_data"):
        c.evals[name][key].update(where)
    return c
