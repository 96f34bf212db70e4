"""Makes what a config names: model, tokenizer, mesh, evaluators.

Every program starts here (through `setup`), so that all agree on what a config means. For weights see
`weights`.
"""

import functools
import importlib
import inspect
import os
import pkgutil
import shlex
import sys
import types

import jax

import paligemma_med
from paligemma_med import evaluators, input_pipeline
from paligemma_med.checkpoints import fingerprint
from paligemma_med.config import files as config_files
from paligemma_med.config import values as config_values
from paligemma_med.evaluation.controls import TrainingRows
from paligemma_med.input_pipeline import overlap
from paligemma_med.models import lora_targets, parts, vlm
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.parallel import chips, distributed, notes, sharding
from paligemma_med.pp import tokenizer
from paligemma_med.pp.files import path_inside


def make_model(config) -> vlm.Model:
    """The `vlm.Model` of config.model and config.lora, with activations in config.dtype."""
    model = vlm.Model(
        dtype=config.get("dtype", "float32"),
        attn_impl=config.get("attn_impl", "xla"),
        lora=config.get("lora") or (),
        **config.model.to_dict(),
    )
    _check_attention(config)
    try:
        adapted(config, model)  # refuses rules that match nothing
        abstract_params(config, model)
    except TypeError as e:
        raise ValueError(f"config.model can't be built: {e}") from e
    return model


def _check_attention(config):
    """Raises ValueError for cuDNN without a GPU, where its kernels would fail in the middle of tracing."""
    towers = {f"config.model.{k}": config.model[k] for k in parts.FAMILIES if k in config.model}
    sections = {"config": config, **towers}
    for where, section in sections.items():
        if section.get("attn_impl") == "cudnn" and chips.backend() != "gpu":
            raise ValueError(
                f"{where}.attn_impl is 'cudnn', which needs an NVIDIA GPU, but the devices here "
                f"are {chips.backend()}: set it to 'xla'."
            )


def adapted(config, model) -> dict:
    """{Target: Spec} of the projections that config.lora adapts."""
    names = abstract_params(config, model.clone(lora=())) if model.lora else ()
    return lora_targets.resolve(model.lora, names, model.leaves)


def make_tokenizer(config, model) -> tokenizer.Tokenizer:
    """The tokenizer of config.tokenizer, after checking that the model has a row for each token."""
    out = tokenizer.get_tokenizer(config.tokenizer)
    if out.vocab_size > model.vocab_size:
        raise ValueError(
            f"config.tokenizer {config.tokenizer!r} has {out.vocab_size} tokens, but the model "
            f"only {model.vocab_size} rows: set config.model.llm.vocab_size."
        )
    return out


def make_mesh(config) -> jax.sharding.Mesh:
    """The device mesh of config.mesh; by default all devices along "data"."""
    mesh = config.get("mesh") or [("data", -1)]
    if isinstance(mesh, str) or any(isinstance(x, str) or len(x) != 2 for x in mesh):
        raise ValueError(f'config.mesh is {mesh!r}; expected pairs like [("data", -1)].')
    return sharding.make_mesh(mesh)


def abstract_params(config, model) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: jax.ShapeDtypeStruct} of all parameters, float32."""
    return dict(_abstract_params(model, config.res))


@functools.lru_cache(maxsize=4)
def _abstract_params(model, res):
    return flatten_tree(vlm.abstract_params(model, image_size=res))


def make_evaluators(config, model, tok, mesh, folder=None, checkpoint=None) -> dict:
    """{name: (evaluator, its section of the config)} for config.evals; big_vision's own are left out.

    Evaluators are `paligemma_med.evaluators.<type>.Evaluator`.

    Args:
      folder: they write to <folder>/eval/<name>; None: nothing is written.
      checkpoint: where the weights come from, for metrics.json; by default the folder.

    Raises:
      ValueError: an impossible section, or missing data.
    """
    out, trained = {}, overlap.trained_on(config.get("input"))
    for name, section in (config.get("evals") or {}).items():
        kw = {k: v for k, v in section.to_dict().items() if k not in config_values.NOT_ARGUMENTS}
        kind = kw.pop("type")
        if config_values.is_big_visions(section):
            if distributed.is_main():
                print(
                    f"config.evals.{name} is big_vision's own: left out. Its trainer alone runs {kind!r}; here "
                    "type='vqa' scores questions and answers.",
                    file=sys.stderr,
                )
            continue
        module = evaluator_module(kind, f"config.evals.{name}")
        arguments = {*_arguments(module.Evaluator)}
        check_eval_keys(section, module.Evaluator, f"config.evals.{name}")
        try:
            shared = overlap.shared_images(trained, kw.get("data") or {})
        except ValueError as e:
            raise ValueError(f"config.evals.{name}: {e}") from e
        if said := overlap.line(name, shared):
            notes.say(said)
        if "about" in arguments:
            kw["about"] = functools.partial(about, dict(kw, type=kind), checkpoint or folder, shared=shared)
        outdir = os.fspath(path_inside(os.path.join(folder, "eval"), name)) if folder else None
        try:
            inputs = input_pipeline.evaluation(kw.pop("data"), kw.pop("pp_fn"), kw.pop("batch_size"), mesh=mesh)
            if train_data := kw.pop("train_data", None):
                source, answer = input_pipeline.open_source(train_data), kw.pop("train_answer", "answer")
                kw["train_data"] = TrainingRows(source.columns, source.features, answer=answer, name=str(source))
            evaluator = module.Evaluator(model, tok, inputs=inputs, total=len(inputs), outdir=outdir, **kw)
        except ValueError as e:
            raise ValueError(f"config.evals.{name}: {e}") from e
        out[name] = (evaluator, section)
    return out


def evaluator_module(kind, where) -> types.ModuleType:
    """The file of `paligemma_med.evaluators` that a section's type names; ValueError if it names none."""
    known = sorted(module.name for module in pkgutil.iter_modules(evaluators.__path__))
    if kind not in known:
        raise ValueError(
            f"{where}.type is {kind!r}; expected one of {known}, or one of big_vision's own, such as "
            "'proj.paligemma.transfers.vqa'."
        )
    return importlib.import_module(f"{evaluators.__name__}.{kind}")


_EVAL_KEYS = ("type", "data", "pp_fn", "batch_size", "train_data", "train_answer", *config_values.NOT_ARGUMENTS)
_FROM_HERE = {"inputs", "total", "outdir", "about"}  # arguments of an evaluator that no section has


def check_eval_keys(section, evaluator, where) -> None:
    """Raises ValueError if a section of config.evals has keys that this evaluator doesn't take."""
    known = {*_EVAL_KEYS, *_arguments(evaluator)} - _FROM_HERE
    config_values.check_keys(section, known, where)


def _arguments(evaluator):
    """Names of the keyword arguments that an evaluator takes."""
    parameters = inspect.signature(evaluator).parameters.values()
    return [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]


def about(section, checkpoint, params, data=None, shared=None) -> dict:
    """What is evaluated, for metrics.json: split, data, section (of the config), fingerprint (of the weights),
    versions, checkpoint, command, shared_images. Collective.

    Args:
      section: of config.evals, a dict.
      checkpoint: where the weights come from, or None.
      params: nested tree of the weights.
      data: what was opened, if not by this project's reader.
      shared: of `overlap.shared_images`.
    """
    data = data or input_pipeline.open_source(section["data"]).about()
    name = "/".join(filter(None, [data["name"], data.get("version")]))
    return dict(
        split=" ".join(filter(None, [name, data["split"]])),
        data=data,
        section=section,
        fingerprint=fingerprint.of_params(params),
        versions=dict(paligemma_med=paligemma_med.__version__, jax=jax.__version__),
        checkpoint=checkpoint and config_files.absolute(checkpoint),
        command=shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]),
        **({"shared_images": shared} if shared else {}),
    )
