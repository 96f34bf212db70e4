"""One's own table of questions and folder of images: stage 1, LoRA, or both.

    python -m paligemma_med.train --workdir=out/own \
        --config=configs/own_data.py:train=q.csv,images=films,init=/weights/mix_448.npz,stage=lora

The table (.csv, .tsv, .jsonl, .parquet, .xlsx) has columns image, question and answer (docs/own_data.md). Arguments:

train     the table. A path with commas stands in quotes.
val       the table for evaluations. Without it a tenth or so of `train`, which is the split "validate" of a column
          split, or drawn by patient, or else by image.
images    the folder that the tables' images are in; default: the table's own.
columns   how columns are called: columns="image=file,question=frage", in quotes.
choose    what is shown of folders of slices and files of several frames: choose="slice=middle", in quotes.
init      the weights to start from, of any form that model_init takes, or a run: stage=lora,init=out/stage1 goes on
          from stage 1.
stage     1: the projection head alone. lora: LoRA in the attention of both towers. both: the two at once.
tiny      the tiny base model (configs/tiny_base.py) in place of PaliGemma-3B, to try out data and commands in a
          minute. It has seen no radiology; what it says means nothing.
res       448; the side of the images in pixels. The weights are for one of 224, 448 and 896.
text_len  128: tokens of question and answer together. Training stops at a row that has more, and says so.
answer    48: tokens of an answer in evaluations, at most.
epochs    5 for stage 1, 4 for LoRA. lr: 1e-5. rank, alpha, dropout: 8, 32, 0.05. micro, accum: 6, 16: examples at a
          time, and how often before a step. All of them the paper's (configs/common_3b.py); for the tiny model those
          of the quickstart.
lang      "en": the answer's language, which PaliGemma's prompt tells ("answer en {question}").
train_split, val_split
          rows of the tables: "train" and "validate"; "all" of both where `val` is given.
"""

from ml_collections import ConfigDict

from configs import common, common_3b, tiny_base

EPOCHS = {"1": 5.0, "lora": 4.0, "both": 4.0}
TRAINED = {"1": "img/head/.*", "lora": ".*/lora_[ab]", "both": "img/head/.*|.*/lora_[ab]"}
TINY_LR = {"1": 3e-3, "lora": 4e-3, "both": 4e-3}
# Of evaluations: what figures are broken down by and clustered by, as far as a table has it.
EVAL_KEYS = (*common_3b.EVAL_KEYS, "content_type", "patient_id")


def get_config(arg=None) -> ConfigDict:
    args = common.parse_arg(
        arg,
        train="",
        val="",
        images="",
        columns="",
        choose="",
        init="",
        stage="1",
        tiny=False,
        res=448,
        text_len=128,
        answer=48,
        epochs=0.0,
        lr=0.0,
        rank=8,
        alpha=32.0,
        dropout=0.05,
        micro=6,
        accum=16,
        lang="en",
        train_split="",
        val_split="",
        seed=0,
    )
    if args.stage not in EPOCHS:
        raise ValueError(f"Config argument stage={args.stage}: expected 1, lora or both.")
    if args.train and not args.init and not args.tiny:
        raise ValueError("Config argument init isn't given: expected weights or a run to start from, or tiny.")
    if not args.train and (args.val or args.images or args.columns or args.choose):
        raise ValueError("Config argument train isn't given: expected the table to train on.")
    c = ConfigDict()
    c.seed = args.seed
    if args.tiny:
        tiny_base.apply(c)
    else:
        common_3b.model(c, args.res)
    c.model_init = common.path_or_none(args.init or (tiny_base.BASE if args.tiny else None))
    c.adapter_init = common.path_or_none(None)  # a PEFT folder to continue training from
    c.text_len = args.text_len

    prompt = common.prompt_for(args.lang)
    train = _table(args, args.train, args.train_split or ("all" if args.val else "train"))
    val = _table(args, args.val or args.train, args.val_split or ("all" if args.val else "validate"))
    c.input = dict(
        data=train,
        pp=common.train_pp(c.res, c.text_len, c.tokenizer, prompt=prompt),
        num_workers=0 if args.tiny else 4,
    )
    c.predict_pp = common.eval_pp(c.res, c.text_len, c.tokenizer, keep=(), prompt=prompt)
    c.total_epochs = args.epochs or EPOCHS[args.stage]
    micro, accum = (min(args.micro * args.accum, 32), 1) if args.tiny else (args.micro, args.accum)
    common_3b.recipe(c, micro, accum, args.lr or (TINY_LR[args.stage] if args.tiny else 1e-5))
    if args.stage != "1":
        # The tiny model learns at a rate at which the paper's scale of 32 / 8 would be too much.
        c.lora = common_3b.lora("attention", args.rank, float(args.rank) if args.tiny else args.alpha, args.dropout)
    c.schedule = [(TRAINED[args.stage], dict(decay_type="constant")), (".*", None)]
    c.grad_clip_norm = 1.0

    c.log_training_steps = 5
    c.evals = {}
    c.evals.own_validate = common.vqa_eval(
        c,
        "",
        "",
        text_len=c.text_len,
        max_new_tokens=args.answer,
        prompt=prompt,
        keep=EVAL_KEYS,
        batch_size=16,
        log_epochs=1.0,
    )
    c.evals.own_validate.update(data=val, train_data=train)
    c.evals.own_validate_loss = common.loss_eval(
        c, "", "", prompt=prompt, keep=EVAL_KEYS, batch_size=16, log_epochs=1.0
    )
    c.evals.own_validate_loss.data = val
    return c


def _table(args, path, split):
    """A `data` section. Without `train`, as for questions to a model as it is, there is nothing to open."""
    data = dict(name=f"table:{path}", split=split)
    return data | {k: args[k] for k in ("images", "columns", "choose") if args[k]}
