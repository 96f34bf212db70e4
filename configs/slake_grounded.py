"""Answers that point: SLAKE's questions, "detect {name}" and "ground {question}" in one model.

    for c in en en_detect en_ground; do python -m data_prep.build slake --config $c --manual_dir ~/Slake1.0; done
    python -m paligemma_med.train --config=configs/slake_grounded.py:init=paligemma-3b-mix-448.npz --workdir=out/boxes
    python -m paligemma_med.train --config=configs/slake_grounded.py:tiny --workdir=out/boxes_tiny

`train` ends with the evaluations: questions and boxes, with controls; docs/grounding.md says what is in them.
PaliGemma-3B is tuned by LoRA in the attention of both towers, with the projection head; it knows the prompt `detect`,
and `ground` is ours. `tiny` trains a model of 2.9 million parameters from scratch, to try it out: it learns where
things mostly are. None of the settings was searched.

Arguments: init (weights), tiny, res, epochs, batch, lr, vqa, detect, ground (shares of the examples), crop (least area
in percent of a random crop, with which the boxes move; 100: none), eval (the split for evaluations), seed, data_dir.
"""

from ml_collections import ConfigDict

from configs import common, common_3b, common_boxes


def get_config(arg=None) -> ConfigDict:
    args = common.parse_arg(
        arg,
        init="",
        tiny=False,
        res=0,
        epochs=0.0,
        batch=0,
        lr=0.0,
        vqa=0.6,
        detect=0.2,
        ground=0.2,
        crop=60,
        eval="validate",
        seed=0,
        data_dir="",
    )
    c = ConfigDict()
    c.seed = args.seed
    (_tiny if args.tiny else _full)(c, args)

    augment = []
    if args.crop < 100:
        augment += [f"inception_crop({c.res}, {args.crop}, 100, 0.8, 1.25, antialias=True)"]
    augment += ["brightness(0.1)", "contrast(0.8, 1.25)"]  # no flips: questions ask for sides
    shares = dict(vqa=args.vqa, detect=args.detect, ground=args.ground)
    sets = dict(vqa="slake/en", detect="slake/en_detect", ground="slake/en_ground")
    c.input.data = shares
    for key, name in sets.items():
        c.input[key] = dict(data=common.dataset(name, "train", args.data_dir))
    c.input.pp = common_boxes.train_pp(c.res, c.text_len, c.tokenizer, augment)
    c.input.on_error = "error"
    # Answers with many boxes may not fit: they are cut, counted and reported.
    c.input.allow_missing_eos = True
    prompt_len = 40
    c.predict_pp = common_boxes.eval_pp(c.res, 64, c.tokenizer, keep=())

    c.log_training_steps = 50
    c.ckpt_epochs = 1.0
    c.update(common.LOOP)
    c.evals = {}
    kw = dict(text_len=prompt_len, max_new_tokens=64, data_dir=args.data_dir, log_percent=1.0)
    c.evals[f"slake_en_{args.eval}"] = common.vqa_eval(c, sets["vqa"], args.eval, **kw | dict(max_new_tokens=32))
    c.evals[f"slake_en_{args.eval}"].pp_fn = common_boxes.eval_pp(c.res, prompt_len, c.tokenizer)
    for key in ("detect", "ground"):
        c.evals[f"slake_{key}_{args.eval}"] = common_boxes.detection_eval(c, sets[key], args.eval, **kw)
    kw = dict(data_dir=args.data_dir, log_percent=1.0)
    for key, name in sets.items():
        key = "en" if key == "vqa" else key
        c.evals[f"slake_{key}_{args.eval}_loss"] = common_boxes.loss_eval(c, name, args.eval, **kw)
    return c


def _full(c, args):
    """PaliGemma-3B: what the paper's two stages train, at once."""
    common_3b.model(c, args.res or 448)
    c.model_init = common.path_or_none(args.init)
    c.text_len = 80  # prompts take 26 tokens at most, answers 61
    c.supervised_len = 64
    c.input = dict(num_workers=4)
    c.lora = common_3b.lora("attention", 8, 32.0, 0.05)
    c.schedule = [(".*/lora_[ab]|img/head/.*", dict(decay_type="constant")), (".*", None)]
    c.total_epochs = args.epochs or 5.0
    if args.batch % 6:
        raise ValueError(f"batch={args.batch}: expected a multiple of 6, which is a micro-batch; tiny takes any.")
    common_3b.recipe(c, 6, (args.batch or 96) // 6, lr=args.lr or 1e-5)


def _tiny(c, args):
    """The model of slake_mini, with <loc> tokens."""
    c.res = args.res or 96
    c.tokenizer = common_boxes.TINY
    c.text_len = 72
    cpu = dict(scan=False, remat_policy="none", dropout=0.1)
    c.model = dict(
        img=dict(variant="Ti/16", width=128, depth=4, mlp_dim=512, num_heads=4, **cpu),
        llm=dict(variant="gemma_mini", depth=4, mlp_dim=512, vocab_size=common_boxes.TINY_VOCAB, **cpu),
    )
    c.model_init = common.path_or_none(args.init)
    c.input = dict(batch_size=args.batch or 32, num_threads=1)
    c.total_epochs = args.epochs or 30.0
    c.optax_name = "scale_by_adam"
    c.optax = dict(b2=0.95)
    c.lr = args.lr or 1e-3
    c.wd = 0.1 * c.lr
    c.wd_mults = [(".*/(kernel|w|gating_einsum|linear)", 1.0)]
    c.grad_clip_norm = 1.0
    c.label_smoothing = 0.0
    c.schedule = dict(decay_type="cosine", warmup_percent=0.1)
