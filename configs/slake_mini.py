"""A PaliGemma of 2.7 million parameters from scratch on SLAKE: the yardstick without weights.

    python -m paligemma_med.train --config=configs/slake_mini.py --workdir=out/slake_mini
    python -m paligemma_med.evaluate --workdir=out/slake_mini \
        --config=configs/slake_mini.py:eval=test

Meant for two CPU cores and an hour. Settings were chosen on `validate`; see docs/slake_mini.md.
Arguments: epochs, res, eval (the split for evaluations), samples (answers per question in an evaluation;
several are drawn at temperature 1), protocol (vqa, closed or open), turns (of dialogues, a separate
evaluation; 0: none), seed, lr, drop.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg=None) -> ConfigDict:
    args = common.parse_arg(
        arg,
        epochs=30.0,
        res=128,
        eval="validate",
        seed=0,
        lr=1e-3,
        drop=0.1,
        wd=0.1,
        size=32,
        area=60,
        every=0.5,
        samples=1,
        protocol="vqa",
        turns=0,
    )
    c = ConfigDict()
    c.seed = args.seed
    c.res = args.res
    # The longest prompt takes 35 tokens and most answers under 5. The few that don't fit (1.3 % of
    # train) are lists that this model wouldn't learn; they are cut, counted and reported.
    c.text_len = 40
    c.tokenizer = "tiny"

    # Loops are unrolled and nothing is computed twice: 2.5 times faster on a CPU than scan.
    cpu = dict(scan=False, remat_policy="none", dropout=args.drop)
    c.model = dict(
        img=dict(variant="Ti/16", width=128, depth=4, mlp_dim=512, num_heads=4, **cpu),
        llm=dict(variant="gemma_mini", depth=4, mlp_dim=512, **cpu),
    )
    c.model_init = common.path_or_none(None)

    # Few images (450) and many questions: each time an image is shown it is slightly different. No flips:
    # questions ask for sides.
    augment = (
        f"inception_crop({c.res}, {args.area}, 100, 0.8, 1.25, antialias=True)",
        "brightness(0.1)",
        "contrast(0.8, 1.25)",
    )
    c.input = dict(
        data=common.dataset("slake/en", "train"),
        pp=common.train_pp(c.res, c.text_len, c.tokenizer, augment),
        batch_size=args.size,
        allow_missing_eos=True,
        num_threads=1,
        on_error="error",
    )
    c.predict_pp = common.eval_pp(c.res, 64, c.tokenizer, keep=())
    c.total_epochs = args.epochs

    c.optax_name = "scale_by_adam"
    c.optax = dict(b2=0.95)
    c.lr = args.lr
    # Decoupled from the learning rate, as in big_vision: multiplied by lr it is AdamW's weight decay.
    c.wd = args.wd * args.lr
    c.wd_mults = [(".*/(kernel|w|gating_einsum|linear)", 1.0)]
    c.grad_clip_norm = 1.0
    c.label_smoothing = 0.0
    c.schedule = dict(decay_type="cosine", warmup_percent=0.1)

    c.log_training_steps = 50
    c.ckpt_epochs = 1.0
    c.update(common.LOOP)
    c.evals = {}
    c.evals[f"slake_en_{args.eval}"] = common.vqa_eval(
        c,
        "slake/en",
        args.eval,
        text_len=36,
        max_new_tokens=48,
        samples=args.samples,
        protocol=args.protocol,
        log_percent=args.every,
    )
    c.evals[f"slake_en_{args.eval}_loss"] = common.loss_eval(c, "slake/en", args.eval, log_percent=args.every)
    if args.turns:
        c.evals[f"slake_en_{args.eval}_dialogues"] = common.dialogue_eval(
            c,
            "slake/en",
            args.eval,
            turns=args.turns,
            text_len=48 * args.turns,
            max_new_tokens=48,
            samples=args.samples,
            protocol=args.protocol,
            log_percent=args.every,
        )
    return c
