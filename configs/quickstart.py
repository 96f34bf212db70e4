"""The quickstart: the tiny base model, which has seen no medical picture, adapted to the phantoms.

`python -m tools.quickstart` runs its two stages, which are the paper's: stage=1 trains only the
projection head, stage=2 trains LoRA in both towers on top of stage 1's result. Minutes on two cores;
the same loop, data path and evaluation as the real thing.

Arguments: stage, init (weights; stage 2 is given the workdir of stage 1), epochs and lr (0: those
of the stage), rank, size (of a batch), seed, eval (the split for evaluations; settings were chosen on
validate), data_dir.
"""

from ml_collections import ConfigDict

from configs import common, tiny_base

EPOCHS = {1: 0.3, 2: 2.3}
LR = {1: 3e-3, 2: 4e-3}


def get_config(arg=None) -> ConfigDict:
    args = common.parse_arg(
        arg,
        stage=1,
        init=tiny_base.BASE,
        epochs=0.0,
        lr=0.0,
        rank=16,
        size=32,
        seed=0,
        eval="test",
        data_dir="",
    )
    if args.stage not in LR:
        raise ValueError(f"Config argument stage={args.stage}: expected 1 or 2.")
    c = ConfigDict()
    c.seed = args.seed
    tiny_base.apply(c)
    c.model_init = common.path_or_none(args.init)
    c.text_len = 24  # the longest question with its answer takes 25, one more than is read
    c.supervised_len = 6

    c.input = dict(
        data=common.dataset("phantom", "train", args.data_dir),
        pp=common.train_pp(c.res, c.text_len, c.tokenizer),
        batch_size=args.size,
        num_threads=1,
        on_error="error",
    )
    c.predict_pp = common.eval_pp(c.res, 64, c.tokenizer, keep=())
    c.total_epochs = args.epochs or EPOCHS[args.stage]

    c.optax_name = "scale_by_adam"
    c.optax = dict(b2=0.99)
    c.lr = args.lr or LR[args.stage]
    c.wd = 0.0
    c.grad_clip_norm = 1.0
    cosine = dict(decay_type="cosine", warmup_percent=0.05)
    if args.stage == 1:
        c.schedule = [("img/head/.*", cosine), (".*", None)]
    else:
        c.lora = [(".*", dict(rank=args.rank, alpha=args.rank))]
        c.schedule = [(".*/lora_[ab]", cosine), (".*", None)]

    c.log_training_steps = 50
    c.ckpt_percent = 0.25
    c.update(common.LOOP)
    c.evals = {}
    c.evals[f"phantom_{args.eval}"] = common.vqa_eval(
        c, "phantom", args.eval, text_len=c.text_len, max_new_tokens=12, batch_size=128, data_dir=args.data_dir
    )
    c.evals[f"phantom_{args.eval}_loss"] = common.loss_eval(
        c, "phantom", args.eval, batch_size=128, data_dir=args.data_dir, log_percent=0.5
    )
    return c
