"""A PaliGemma of 2.7 million parameters from scratch on SLAKE: the yardstick without weights.

    python -m paligemma_med.train --config=configs/slake_mini.py --workdir=out/slake_mini
    python -m paligemma_med.evaluate --workdir=out/slake_mini \
        --config=configs/slake_mini.py:eval=test

Meant for two CPU cores and an hour. Settings were chosen on `validate`; see docs/slake_mini.md.
Arguments, at the values of that run:
    epochs (of the English questions, also where others are mixed in), seed, lr, wd, drop (dropout), size (of a batch),
    smoothing (of labels), ema (decay of the averaged weights; 0: none)
    res, patch (px), width, depth (of the tower), stem (channels of convolutions before its patches; 0: none)
    area (least area of a random crop, in percent), rotate (degrees), noise (share of the grey range): augmentation
    vqa, zh, detect: shares of English questions, of Chinese ones and of boxes of the same images
    eval (the split for evaluations), every (epochs between them), samples (answers per question in an evaluation;
    several are drawn at temperature 1), protocol (vqa, closed or open), turns (of dialogues, a separate evaluation; 0:
    none)
"""

from ml_collections import ConfigDict

from configs import common, common_boxes

ENGLISH = 4918  # questions of slake/en train


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
        rotate=0.0,
        noise=0.0,
        smoothing=0.0,
        ema=0.0,
        patch=16,
        width=128,
        depth=4,
        stem=0,
        vqa=1.0,
        zh=0.0,
        detect=0.0,
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
    # Lists of boxes are longer, and Chinese takes about three tokens a character.
    c.text_len = 72 if args.zh or args.detect else 40
    c.tokenizer = common_boxes.TINY if args.detect else "tiny"

    # Loops are unrolled and nothing is computed twice: 2.5 times faster on a CPU than scan.
    cpu = dict(scan=False, remat_policy="none", dropout=args.drop)
    c.model = dict(
        img=_tower(args) | cpu,
        llm=dict(variant="gemma_mini", depth=4, mlp_dim=512, **cpu),
    )
    if args.detect:
        c.model.llm.vocab_size = common_boxes.TINY_VOCAB
    c.model_init = common.path_or_none(None)

    # Few images (450) and many questions: each time an image is shown it is slightly different. No flips:
    # questions ask for sides.
    crop = f"inception_crop({c.res}, {args.area}, 100, 0.8, 1.25, antialias=True)"
    grey = ("brightness(0.1)", "contrast(0.8, 1.25)", *([f"noise({args.noise})"] if args.noise else []))
    augment = (*([f"rotate({args.rotate})"] if args.rotate else []), crop, *grey)
    pp = common.train_pp(c.res, c.text_len, c.tokenizer, augment)
    c.input = dict(batch_size=args.size, allow_missing_eos=True, num_threads=1, on_error="error")
    english = common.dataset("slake/en", "train")
    if args.zh or args.detect:
        # Without rotation, which boxes couldn't follow.
        boxes_pp = common_boxes.train_pp(c.res, c.text_len, c.tokenizer, (crop, *grey))
        zh_pp = common.train_pp(c.res, c.text_len, c.tokenizer, augment, common.prompt_for("zh"))
        sets = dict(
            vqa=dict(data=english, pp=pp),
            zh=dict(data=common.dataset("slake/zh_of_en_train", "train"), pp=zh_pp),
            detect=dict(data=common.dataset("slake/en_detect", "train"), pp=boxes_pp),
        )
        shares = {name: args[name] for name in sets if args[name]}
        c.input.update(data=shares, **{name: sets[name] for name in shares})
        # No image that is measured on may be trained on: the run checks it at its start.
        c.input.held_out = common.dataset("slake/en", "validate+test")
        c.total_examples = round(args.epochs * ENGLISH)
    else:
        c.input.update(data=english, pp=pp)
        c.total_epochs = args.epochs
    predict = common_boxes.eval_pp if args.detect else common.eval_pp
    c.predict_pp = predict(c.res, 64, c.tokenizer, keep=())

    c.optax_name = "scale_by_adam"
    c.optax = dict(b2=0.95)
    c.lr = args.lr
    # Decoupled from the learning rate, as in big_vision: multiplied by lr it is AdamW's weight decay.
    c.wd = args.wd * args.lr
    c.wd_mults = [(".*/(kernel|w|gating_einsum|linear)", 1.0)]
    c.grad_clip_norm = 1.0
    c.label_smoothing = args.smoothing
    if args.ema:
        c.ema_decay = args.ema
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
    if args.ema:
        as_trained = c.evals[f"slake_en_{args.eval}"].to_dict() | dict(ema=False, log_percent=1.0)
        c.evals[f"slake_en_{args.eval}_as_trained"] = as_trained
    if args.detect:
        c.evals[f"slake_detect_{args.eval}"] = common_boxes.detection_eval(
            c, "slake/en_detect", args.eval, text_len=36, max_new_tokens=64, log_percent=1.0
        )
        c.evals[f"slake_detect_{args.eval}_loss"] = common_boxes.loss_eval(
            c, "slake/en_detect", args.eval, log_percent=1.0
        )
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


def _tower(args):
    """The image tower, with 32 numbers a head."""
    if args.width % 32:
        raise ValueError(f"width={args.width}: expected a multiple of 32, which is the width of a head.")
    if args.res % args.patch:
        raise ValueError(f"res={args.res}: expected a multiple of patch={args.patch}.")
    tower = dict(variant=f"Ti/{args.patch}", width=args.width, depth=args.depth, mlp_dim=4 * args.width)
    return tower | dict(num_heads=args.width // 32) | (dict(stem=args.stem) if args.stem else {})
