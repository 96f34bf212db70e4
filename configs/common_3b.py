"""The paper's recipe at the true size: what its two stages, and the experiments of stage 2, share.

`stage2` makes the config up to the data; each configs/stage2_*.py adds its data sets, prompt, text
length and evaluations.

Where the paper ("Adapting Lightweight Vision Language Models for Radiological VQA"), its draft and
the authors' scripts differ, the variants are arguments of the configs:

stage1   a stage-1 workdir to start from; `init` instead starts from base weights, which is the
         paper's ablation without stage 1. Neither: random weights.
lora     "attention" (default): q, k, v and output of both towers, which is what the paper's text
         says (section 4.4, "the attention heads in both the vision tower and the language model").
         "script": the targets of lora_finetune.py, q, k, v of both towers and o, gate, up, down of
         Gemma (SigLIP's output isn't matched, because it is called out_proj).
         "draft": the draft's list, the same without gate.
        "figure": the figure of stage 2, attention, MLPs and the projection head.
         "llm": only attention of Gemma, the README's table.
rank, alpha, dropout
        8, 32 and 0.05: the paper gives none; all eight adapters that the authors saved have
         these. The draft says rank 12.
prompt   "en" (default): "answer en {question}", the prompt that PaliGemma's mix weights were tuned
         with. "bare": "answer {question}", as in lora_finetune.py.
base     paligemma_3b, the paper's (default), or, in the paper's recipe, paligemma2_3b, paligemma2_10b, paligemma2_28b
         (`init` or `stage1` is then of that size). The paper used none of these.
res      448 as in the paper; the scripts have 224.
norm     "example" (default): each example's token mean counts the same, as in big_vision, and as in
         the authors' scripts, whose batches hold one example. "token": Hugging Face's mean over all
         tokens of a step.
clip     1.0: the paper doesn't say; it is the default of Hugging Face's trainer.
micro, accum
         6 and 16 (96 in effect), table 3; the scripts have 1 and 4.
epochs   the paper gives none for stage 2. Defaults are where the curves of validation loss in the
         authors' article end or are lowest: ROCO 7, MedPix 4, both 9, PMC-VQA 4.
lr       1e-5, table 3.
letters  (stage2_medpix2, stage2_rocov2) False (default). True, only for sets of synthesised multiple
         choice: the options are in the prompt, and the letter is the answer.
tiny     False (default). True: the tiny base model (configs/tiny_base.py) instead of PaliGemma-3B, to
         try out data and commands in minutes. It has seen no radiology; its figures mean nothing.
samples  answers per question in evaluations: 1, the most probable one. The paper has 5, here drawn at
         temperature 1 (the paper gives none).
seed, data_dir
         as everywhere; without data_dir, sets are looked up in TFDS' default folder.

Table 3 also has: constant schedule, label smoothing 0, weight decay 0, fp16. Here frozen weights
and activations are bfloat16, which has float32's range, and what is trained stays float32.
"""

from ml_collections import ConfigDict, config_dict

from configs import common, tiny_base
from paligemma_med.models import presets
from paligemma_med.pp import rows

# What evaluators need to know about each question, and what figures are broken down by.
EVAL_KEYS = (*rows.KEYS, "modality", "location", "location_category")

_TOWERS = "img/Transformer/.*"
_LORA = {
    "attention": [(f"{_TOWERS}/(query|key|value|out)/kernel|llm/layers/attn/.*", True)],
    "script": [(f"{_TOWERS}/(query|key|value)/kernel|llm/layers/.*", True)],
    "draft": [
        ("llm/layers/mlp/gating_einsum:gate", False),
        (f"{_TOWERS}/(query|key|value)/kernel|llm/layers/.*", True),
    ],
    "figure": [("img/.*|llm/layers/.*", True)],
    "llm": [("llm/layers/attn/.*", True)],
}
_LANGUAGES = {"en": "en", "bare": ""}
_ROCO = {"v1": "roco_v1/qa", "v2": "rocov2/qa"}


def parse_arg(arg, **more) -> ConfigDict:
    """The arguments of a stage-2 config: those above and `more`, which must contain `epochs`."""
    args = common.parse_arg(
        arg,
        stage1="",
        init="",
        base="paligemma_3b",
        res=448,
        lora="attention",
        rank=8,
        alpha=32.0,
        dropout=0.05,
        prompt="en",
        norm="example",
        clip=1.0,
        micro=6,
        accum=16,
        lr=1e-5,
        tiny=False,
        samples=1,
        seed=0,
        data_dir="",
        **more,
    )
    if args.stage1 and args.init:
        raise ValueError("Give stage1=… (a workdir) or init=… (weights, without stage 1), not both.")
    return args


BASES = tuple(name for name in presets.PRESETS if name.startswith("paligemma"))


def model(c, res, base="paligemma_3b") -> None:
    """PaliGemma in bfloat16 at `res` px; `base` is one of BASES."""
    if base not in BASES:
        raise ValueError(f"Config argument base={base!r}: expected one of {list(BASES)}.")
    c.res = res
    c.tokenizer = common.GEMMA
    c.model = presets.PRESETS[base]
    c.dtype = "bfloat16"
    c.frozen_dtype = "bfloat16"
    c.attn_impl = "xla"  # "cudnn" on an NVIDIA GPU: fused kernels, less memory


def recipe(c, micro, accum, lr) -> None:
    """Optimizer, batch and mesh of both stages (table 3)."""
    c.input.batch_size = micro * accum
    c.input.on_error = "error"
    c.grad_accum_steps = accum
    c.optax_name = "scale_by_adam"
    c.lr = lr
    c.wd = 0.0
    c.label_smoothing = 0.0
    c.mesh = [("data", -1)]
    c.sharding_strategy = [(".*", 'fsdp(axis="data")')]
    # Logits are cut by vocabulary, so that the embedding table, 1 GB, isn't gathered.
    c.sharding_rules = [("act_vocab", "data"), ("act_batch", "data")]
    c.ckpt_epochs = 1.0
    c.update(common.LOOP)


def lora(which, rank, alpha, dropout) -> list[tuple[str, dict | None]]:
    """config.lora of a variant; ValueError lists the known variants."""
    if which not in _LORA:
        raise ValueError(f"lora={which!r}: expected one of {sorted(_LORA)}.")
    spec = dict(rank=rank, alpha=alpha, dropout=dropout)
    return [(regex, spec if adapted else None) for regex, adapted in _LORA[which]]


def stage2(args) -> ConfigDict:
    """A stage-2 config without its data and texts.

    Args:
      args: from `parse_arg`.

    Returns:
      A ConfigDict: model, weights, adapters, optimizer, batch and schedule. The experiment must add
      text_len, input.data, input.pp, predict_pp and evals.
    """
    c = ConfigDict()
    c.seed = args.seed
    if args.tiny:
        tiny_base.apply(c)
    else:
        model(c, args.res, args.base)
    c.model_init = common.path_or_none(args.stage1 or args.init or (tiny_base.BASE if args.tiny else None))
    c.lora = lora(args.lora, args.rank, args.alpha, args.dropout)
    c.adapter_init = common.path_or_none(None)  # a PEFT folder to continue training from
    # No supervised_len: the longest answers fill nearly all of text_len.
    # For small GPUs, --config.loss_chunk=64 computes logits of 64 positions at a time.
    c.loss_chunk = config_dict.placeholder(int)
    # A few captions have thousands of characters; what is cut is counted and reported.
    c.input = dict(num_workers=0 if args.tiny else 4, allow_missing_eos=True)
    c.total_epochs = args.epochs
    recipe(c, args.micro, args.accum, args.lr)
    c.loss_norm = args.norm
    c.grad_clip_norm = args.clip
    c.schedule = [(".*/lora_[ab]", dict(decay_type="constant")), (".*", None)]
    c.log_training_steps = 20
    return c


def prompt_for(args, options=False) -> str:
    """The prompt that args.prompt names; `options` as in `common.prompt_for`."""
    if args.prompt not in _LANGUAGES:
        raise ValueError(f"prompt={args.prompt!r}: expected one of {sorted(_LANGUAGES)}.")
    return common.prompt_for(_LANGUAGES[args.prompt], options)


def roco(version) -> str:
    """The ROCO data set of a version; ValueError lists the known versions."""
    if version not in _ROCO:
        raise ValueError(f"version={version!r}: expected one of {sorted(_ROCO)}.")
    return _ROCO[version]
