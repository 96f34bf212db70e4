"""What the configs of the other systems share: medgemma_4b, llama_clip, bloom_qformer, pefomed.

The models are `paligemma_med.models.presets`. Arguments that all four have, besides their own:

tiny     False (default). True: a model of the same parts with a few thousand parameters and the tokenizer `tiny`, at
         random weights, to try out data and commands in a minute. Its answers mean nothing.
init     weights of the whole model: a run's workdir, or any form that `model_init` takes. Or of its parts:
img, connector, llm
tokenizer
         its file. Without it an environment variable names it (paligemma_med/pp/tokenizer.py).
data     the data set's name, with splits train and validate; data_dir: its folder, by default TFDS' own.
rank, alpha, dropout, lr, epochs
         0 takes the system's; -1 for dropout, which may be 0.
steps    if not 0, the number of steps in place of epochs.
micro, accum
         examples in a micro-batch, and micro-batches in a step.
tp       1. More: so many chips share each example, by heads, widths and vocabulary, for a micro-batch of fewer examples
         than there are chips (docs/sharding.md).
max_new_tokens, samples
         of an answer in evaluations, and answers per question: 1 is the most probable one.
seed     as everywhere.

Frozen weights and activations are bfloat16, what is trained is float32. `--config.frozen_dtype=nf4` takes a quarter of
the memory, as Google's notebook for MedGemma does.
"""

import re

from ml_collections import ConfigDict, config_dict

from configs import common
from paligemma_med.models import presets
from paligemma_med.pp import rows

# A few thousand parameters, of the same kinds of parts.
_IMG = dict(variant="mu/8", depth=2, scan=False, remat_policy="none")
_LLM = dict(variant="gemma_mu", depth=2, scan=False, remat_policy="none")
_LLAMA = dict(**_LLM, norm="rms", act="silu", embed_scale=False, tie=False)
_BLOOM = dict(norm="layer", fused=True, position="alibi", embed_norm=True, embed_scale=False)
_CLIP = dict(cls=True, gelu="exact", mean=[0.48, 0.46, 0.41], std=[0.27, 0.26, 0.28])
_TOWERS = dict(
    siglip=_IMG, biomedclip=dict(**_IMG, **_CLIP), eva=dict(**_IMG, **_CLIP, key_bias=False, final_norm=1e-5)
)
TINY = {
    "paligemma_3b": dict(img=_IMG, llm=_LLM),
    "medgemma_4b": dict(
        img=_IMG,
        connector=dict(kind="projector", reduce="pool", factor=2, norm=True, bias=False),
        llm=dict(**_LLM, post_norms=True, qk_norm=True, window=32, window_every=2, rope_scale=8.0, rope_theta=1e6),
    ),
    "llama_clip": dict(img=dict(**_IMG, **_CLIP, final_norm=None), llm=_LLAMA),
    "bloom_qformer": dict(
        img=dict(**_IMG, **_CLIP, keep_cls=True),
        connector=dict(kind="qformer", queries=3, inner=16, depth=2, mlp_dim=24, num_heads=2),
        llm=dict(**_LLM, **_BLOOM, num_kv_heads=4, mlp_dim=256),
    ),
    "pefomed": dict(
        img=dict(**_IMG, **_CLIP, key_bias=False, final_norm=1e-5),
        connector=dict(kind="projector", reduce="group", factor=4),
        llm=dict(**_LLAMA, num_kv_heads=4),
    ),
}
TINY_RES, TINY_TEXT = 32, 160


def tiny_tower(name, res) -> tuple[int, dict]:
    """(resolution, arguments of the tower) in place of "siglip", "biomedclip" or "eva" at `res` px."""
    return TINY_RES * res // 224, _TOWERS[name]


def parse_arg(arg, **more) -> ConfigDict:
    """The arguments of a config: those above and `more`."""
    return common.parse_arg(
        arg,
        **dict(
            tiny=False,
            init="",
            img="",
            connector="",
            llm="",
            tokenizer="",
            data="slake/en",
            data_dir="",
            rank=0,
            alpha=0.0,
            dropout=-1.0,
            lr=0.0,
            epochs=0.0,
            steps=0,
            micro=4,
            accum=4,
            tp=1,
            max_new_tokens=64,
            samples=1,
            seed=0,
        )
        | more,
    )


def make(args, preset, tokenizer, *, res, text_len, doc=None) -> ConfigDict:
    """A config of a preset without adapters, schedule, data and texts.

    Args:
      args: from `parse_arg`.
      preset: its name in `presets.PRESETS`.
      tokenizer: name of the tokenizer, or its spec without a file, "bpe(size=250880)".
      res, text_len: of the true size; the tiny one has its own.
      doc: the config's docstring, whose part about what isn't from the paper every start prints.
    """
    c = ConfigDict()
    c.seed = args.seed
    model = presets.PRESETS[preset]
    if args.tiny:
        model = {**model, **TINY[preset]}
        c.res, c.text_len, c.tokenizer = TINY_RES, TINY_TEXT, "tiny"
    else:
        c.res, c.text_len, c.tokenizer = res, text_len, _with_file(tokenizer, args.tokenizer)
        c.dtype = c.frozen_dtype = "bfloat16"
        c.attn_impl = "xla"  # "cudnn" on an NVIDIA GPU; BLOOM's ALiBi has no such kernel
    c.model = model
    if "final_norm" in c.model.img:  # None, of which the command line couldn't change the type
        c.model.img.final_norm = c.model.img.final_norm or config_dict.placeholder(float)
    c.model_init = _init(args)
    c.adapter_init = common.path_or_none(None)  # a PEFT folder to continue training from
    c.loss_chunk = config_dict.placeholder(int)
    c.input = dict(
        data=common.dataset(args.data, "train", args.data_dir),
        batch_size=args.micro * args.accum,
        num_workers=0 if args.tiny else 4,
        allow_missing_eos=True,  # few texts are longer than text_len; what is cut is counted and reported
        on_error="error",
    )
    c.grad_accum_steps = args.accum
    c.optax_name = "scale_by_adam"
    c.label_smoothing = 0.0
    c.mesh, strategy, vocab = [("data", -1)], 'fsdp(axis="data")', "data"
    if args.tp != 1:
        c.mesh, strategy, vocab = [("data", -1), ("model", args.tp)], f'tp(axis="model")|{strategy}', "model"
    c.sharding_strategy = [(".*", strategy)]
    c.sharding_rules = [("act_vocab", vocab), ("act_batch", "data")]
    c.ckpt_epochs = 1.0
    c.log_training_steps = 20
    c.notes = not_from_the_paper(doc)
    c.update(common.LOOP)
    return c


def not_from_the_paper(doc) -> str:
    """The paragraph, or list, after "not from the paper:" or "Not from it:" in a docstring; "" without one."""
    found = re.search(r"ot from (?:the paper|it):\s+(.*?)\n\n", doc or "", re.DOTALL)
    return f"Not from the paper (defaults of the config's arguments):\n{found[1]}" if found else ""


def _with_file(spec, path):
    if not path:
        return spec
    name, _, rest = spec.rstrip(")").partition("(")
    return f"{name}({', '.join(filter(None, [f'model={path!r}', rest]))})"


def _init(args):
    parts = {name: args[name] for name in ("img", "connector", "llm") if args[name]}
    if args.init and parts:
        raise ValueError(f"Give init=… (a whole model) or {'=…, '.join(parts)}=… (its parts), not both.")
    return parts or common.path_or_none(args.init)


def recipe(
    c, args, *, lr, wd=0.0, epochs=0.0, steps=0, decay, warmup=0.03, trained, adapters=".*/lora_[ab]", **more
) -> None:
    """Learning rate, length and what is trained.

    Args:
      lr, epochs, steps: the system's, unless args has others; epochs or steps.
      wd: weight decay, of kernels alone.
      decay: of the learning rate, "cosine", "linear" or "constant".
      warmup: share of all steps.
      trained: regex of the trained leaves beside adapters, or "".
      adapters: regex of the trained leaves of adapters.
      more: of the schedule (`optim.make_schedule`).
    """
    c.lr = args.lr or lr
    c.wd = wd * c.lr  # big_vision's: not multiplied by the learning rate again
    if args.steps or not (args.epochs or epochs):
        c.total_steps = args.steps or steps
    else:
        c.total_epochs = args.epochs or epochs
    schedule = dict(decay_type=decay, warmup_percent=warmup, **more)
    c.schedule = [("|".join(filter(None, [trained, adapters])), schedule), (".*", None)]


def lora(args, *rules, rank, alpha, dropout) -> list[tuple[str, dict | None]]:
    """config.lora: adapters on what the regexes `rules` match; (regex, None) leaves out."""
    spec = dict(
        rank=args.rank or rank,
        alpha=args.alpha or float(alpha),
        dropout=dropout if args.dropout < 0 else args.dropout,
    )
    return [rule if isinstance(rule, tuple) else (rule, spec) for rule in rules]


def texts(c, args, prompt, *, asked=None, resize="bilinear", protocol="vqa", choices=False, split="") -> None:
    """The pp strings and the evaluations: answers, and the loss of the true ones.

    Args:
      prompt: of training, a `common_prompts.Prompt`.
      asked: of evaluation and `predict`, if another.
      resize: "bilinear" or "bicubic".
      protocol: of the figures, "vqa", "open" or "report".
      choices: whether the letter of one of four options is learnt, and scored; `prompt` has them.
      split: of the evaluation, by default validate.
    """
    asked = asked or prompt
    answer = rows.ANSWER_LETTER if choices else "answer"
    c.input.pp = common.train_pp(c.res, c.text_len, c.tokenizer, prompt=prompt, answer=answer, resize=resize)
    c.predict_pp = common.eval_pp(c.res, c.text_len, c.tokenizer, keep=(), prompt=asked, resize=resize)
    c.evals = {}
    kw = dict(resize=resize, split=split)
    if choices:
        kw |= dict(evaluation=common.multiple_choice_eval)
    else:
        kw |= dict(protocol=protocol)
    _evaluate(c, args, args.data, prompt, asked, answer=answer, **kw)


def mixture(c, args, sets, *, resize="bilinear", protocol="vqa") -> None:
    """The same for several sets that are mixed, each with evaluations of its own.

    Args:
      sets: {key: (name of the data set, weight, `common_prompts.Prompt`)}; `predict` asks as the first does.
      Others as of `texts`.
    """
    c.input.data = {key: float(weight) for key, (_, weight, _) in sets.items()}
    c.evals = {}
    for key, (name, _, prompt) in sets.items():
        pp = common.train_pp(c.res, c.text_len, c.tokenizer, prompt=prompt, resize=resize)
        c.input[key] = dict(data=common.dataset(name, "train", args.data_dir), pp=pp)
        if not c.get("predict_pp"):
            c.predict_pp = common.eval_pp(c.res, c.text_len, c.tokenizer, keep=(), prompt=prompt, resize=resize)
        _evaluate(c, args, name, prompt, prompt, resize=resize, protocol=protocol)


def _evaluate(c, args, data, prompt, asked, *, evaluation=common.vqa_eval, split="", answer="answer", resize, **kw):
    name = f"{data.partition('/')[0]}_{split or 'validate'}"
    both = dict(data_dir=args.data_dir, answer=answer, resize=resize, batch_size=16, log_epochs=1.0)
    c.evals[name] = evaluation(
        c,
        data,
        split or "validate",
        text_len=c.text_len,
        max_new_tokens=args.max_new_tokens,
        prompt=asked,
        samples=args.samples,
        **both,
        **kw,
    )
    c.evals[f"{name}_loss"] = common.loss_eval(c, data, split or "validate", prompt=prompt, **both)
