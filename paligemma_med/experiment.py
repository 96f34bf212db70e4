"""From a config to the things it names: model, tokenizer, mesh, weights, evaluators.

Every entry point (train, evaluate, predict) starts here, so that they agree on what a config means.
"""

import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shlex
import sys
import traceback

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

import paligemma_med
from paligemma_med import checkpoints, input_pipeline, quantise
from paligemma_med.checkpoints import bv, fingerprint, npz, workdir
from paligemma_med.config import values as config_values
from paligemma_med.models import lora_targets, vlm
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.parallel import distributed, sharding
from paligemma_med.pp import tokenizer
from paligemma_med.training import optim

# Keys of a config. An unknown one is a typo more often than not, and is refused.
KEYS = frozenset(
    """
    seed res text_len tokenizer
    model model_init resample_posemb lora adapter_init dtype frozen_dtype attn_impl
    input total_steps total_epochs total_examples
    optax_name optax lr lr_mults wd wd_mults schedule grad_clip_norm grad_accum_steps
    label_smoothing loss_norm supervised_len loss_chunk skip_nonfinite compilation_cache
    mesh sharding_strategy sharding_rules
    log_training_steps log_training_epochs log_training_percent
    ckpt_steps ckpt_epochs ckpt_percent keep_ckpt keep_best
    evals predict_pp
    tensorboard wandb peak_tflops
    """.split()
)


def check_config(config):
    """Refuses configs with unknown or missing keys, or values that can't be meant; ValueError.

    A config with adapter_init and no lora of its own is given the adapter's, since only together
    with its ranks and scales do the factors mean something.
    """
    config_values.check_keys(config, KEYS, "config")
    if missing := [k for k in ("model", "res", "text_len", "tokenizer") if k not in config]:
        raise ValueError(f"config lacks {missing}.")
    config_values.check(config)
    if config.get("adapter_init") and not config.get("lora"):
        with config.unlocked():
            config.lora = checkpoints.rules_of(checkpoints.load_adapter(config.adapter_init))


def check_training_config(config):
    """`check_config`, and what training alone needs; ValueError."""
    check_config(config)
    if missing := [k for k in ("input", "optax_name", "lr") if k not in config]:
        raise ValueError(f"config lacks {missing}, which training needs.")
    if "batch_size" not in config.input:
        raise ValueError(f"config.input lacks ['batch_size'], found {sorted(config.input)}.")
    size, accum = config.input.batch_size, config.get("grad_accum_steps") or 1
    if size % accum:
        raise ValueError(f"config.input.batch_size = {size} doesn't divide by config.grad_accum_steps = {accum}.")
    mesh = make_mesh(config)
    shards = sharding.batch_sharding(mesh).mesh.shape[sharding.DATA_AXIS]
    if size % (accum * shards):
        more = -(-size // (accum * shards)) * accum * shards
        what = f"{accum} microbatches (config.grad_accum_steps) on " if accum > 1 else ""
        raise ValueError(
            f"config.input.batch_size = {size} doesn't divide into {what}{shards} devices along "
            f'the mesh axis "{sharding.DATA_AXIS}"; {more} does'
            + (", or fewer accumulated steps." if accum > 1 else ".")
        )


def make_model(config):
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
    """cuDNN's kernels are a GPU's; elsewhere they fail while tracing."""
    towers = {f"config.model.{k}": config.model[k] for k in ("img", "llm") if k in config.model}
    sections = {"config": config, **towers}
    for where, section in sections.items():
        if section.get("attn_impl") == "cudnn" and jax.default_backend() != "gpu":
            raise ValueError(
                f"{where}.attn_impl is 'cudnn', which needs an NVIDIA GPU, but the devices here "
                f"are {jax.default_backend()}: set it to 'xla'."
            )


def adapted(config, model):
    """{Target: Spec} of the projections that config.lora adapts."""
    names = abstract_params(config, model.clone(lora=())) if model.lora else ()
    return lora_targets.resolve(model.lora, names)


def make_tokenizer(config, model):
    """The tokenizer of config.tokenizer, after checking that the model has a row for each token."""
    out = tokenizer.get_tokenizer(config.tokenizer)
    llm = abstract_params(config, model)["llm/embedder/input_embedding"]
    if out.vocab_size > llm.shape[0]:
        raise ValueError(
            f"config.tokenizer {config.tokenizer!r} has {out.vocab_size} tokens, but the model "
            f"only {llm.shape[0]} rows: set config.model.llm.vocab_size."
        )
    return out


def make_mesh(config):
    """The device mesh of config.mesh; by default all devices along "data"."""
    mesh = config.get("mesh") or [("data", -1)]
    if isinstance(mesh, str) or any(isinstance(x, str) or len(x) != 2 for x in mesh):
        raise ValueError(f'config.mesh is {mesh!r}; expected pairs like [("data", -1)].')
    return sharding.make_mesh(mesh)


def abstract_params(config, model):
    """{name: jax.ShapeDtypeStruct} of all parameters, float32."""
    return dict(_abstract_params(model, config.res))


@functools.lru_cache(maxsize=4)
def _abstract_params(model, res):
    return flatten_tree(vlm.abstract_params(model, image_size=res))


def param_dtypes(config, names, trained):
    """{name: dtype}: trained leaves float32, frozen ones config.frozen_dtype.

    Those that are quantised (`param_kinds`) have the type here that the others then have.
    """
    frozen = config.get("frozen_dtype", "float32")
    frozen = jnp.dtype(quantise.REST if frozen in quantise.KINDS else frozen)
    trained = set(trained)
    return {n: jnp.dtype("float32") if n in trained else frozen for n in names}


def param_kinds(config, abstract, trained):
    """{name: kind, of `quantise.kind_of`} of the leaves that config.frozen_dtype quantises.

    Args:
      abstract: {name: array or jax.ShapeDtypeStruct}.
    """
    wanted = config.get("frozen_dtype")
    if wanted not in quantise.KINDS:
        return {}
    kinds = {n: quantise.kind_of(n, x.shape, wanted) for n, x in abstract.items() if n not in trained}
    return {n: kind for n, kind in kinds.items() if kind}


def param_shardings(config, abstract, mesh):
    """{name: NamedSharding} by config.sharding_strategy; by default a copy on every device."""
    return sharding.infer_sharding(abstract, _sharding_strategy(config), mesh)


def _sharding_strategy(config):
    return config.get("sharding_strategy") or [(".*", "replicate")]


def initial_params(config, model, mesh, *, dtypes=None, kinds=None):
    """The parameters training starts from, on the devices.

    They come from config.model_init, or are random by config.seed if that is None. Factors of
    adapters come from config.adapter_init, or from a model_init that has them, or are fresh.
    Weights from files go to the devices leaf by leaf, each in its type; of `kinds`, quantised.

    Returns:
      ({name: jax.Array} sharded by config.sharding_strategy, names that model_init didn't give).

    Raises:
      checkpoints.CheckpointError: what was found doesn't fit the config.
      ValueError: weights to be quantised that no file gives.
    """
    abstract, kinds = abstract_params(config, model), kinds or {}
    shardings = param_shardings(config, abstract, mesh)
    dtypes = dtypes or param_dtypes(config, abstract, abstract)
    host, adapter = initial_host_params(config, model)
    random = [n for n in abstract if n not in host and n not in adapter]
    if given := next((n for n in random if n in kinds), None):
        raise ValueError(
            f"config.frozen_dtype={config.frozen_dtype!r} quantises weights that config.model_init "
            f"gives, but it gives none for {given}: set it, or train them."
        )
    beside = {*random, *adapter}
    params = place_params({**host, **adapter}, dtypes, shardings, kinds)
    if random:
        params |= _random_params(config, model, random, dtypes, shardings)
    return {n: params.pop(n) for n in abstract} | params, beside


def initial_host_params(config, model):
    """What files give of the parameters that training starts from, on the host.

    Returns:
      ({name: array, which may still be in its file} of config.model_init, the same of
      config.adapter_init); either may be empty.

    Raises:
      checkpoints.CheckpointError: what was found doesn't fit the config.
    """
    abstract, host, adapter = abstract_params(config, model), {}, {}
    if config.get("model_init"):
        host = load_host_params(config.model_init, abstract, config.get("resample_posemb"))
        if any(map(lora.is_factor, host)):
            _check_scales(config, model, config.model_init)
    if config.get("adapter_init"):
        if any(map(lora.is_factor, host)):
            raise _two_adapters(config)
        adapter = load_host_adapter(config, model)
    return host, adapter


def _two_adapters(config):
    return checkpoints.CheckpointError(
        f"{config.model_init} has adapters of its own, and config.adapter_init names "
        f"{config.adapter_init}: give one of them."
    )


def _random_params(config, model, names, dtypes, shardings):
    """Those of a fresh model's parameters; what isn't asked for is not computed."""

    def init():
        tree = vlm.init_params(model, jax.random.key(config.get("seed", 0)), image_size=config.res)
        flat = flatten_tree(tree)
        return {n: flat[n].astype(dtypes[n]) for n in names}

    return jax.jit(init, out_shardings={n: shardings[n] for n in names})()


def load_host_adapter(config, model):
    """{name: numpy array} of the factors of config.adapter_init, which must be those of config.lora
    to the rank and the scale (dropout is training's business)."""
    adapter = checkpoints.load_adapter(config.adapter_init)
    want, found = adapted(config, model), adapter.specs
    for target in sorted({*want, *found}):
        a, b = (s.get(target) for s in (want, found))
        if a is None or b is None or a.rank != b.rank or not _same_scale(a, b):
            raise checkpoints.CheckpointError(
                f"config.adapter_init {config.adapter_init} differs from config.lora at "
                f"{target.name}: found {b}, expected {a}. Without config.lora it sets the ranks."
            )
    plain = unflatten_tree(abstract_params(config, model.clone(lora=())))
    kw = config.model.to_dict()
    _, tree = checkpoints.apply_adapter(kw.get("img"), kw.get("llm"), plain, adapter)
    return {n: x for n, x in flatten_tree(tree).items() if lora.is_factor(n)}


def _check_scales(config, model, spec):
    """A workdir's adapters mean what they did in its run only under the same rules."""
    rules = _rules_of_run(spec)
    if rules is None:
        return
    names = abstract_params(config, model.clone(lora=()))
    want, found = adapted(config, model), lora_targets.resolve(rules, names)
    for target in want:
        a, b = want[target], found.get(target)
        if b is not None and not _same_scale(a, b):
            raise checkpoints.CheckpointError(
                f"{spec} was trained with {b} at {target.name}, but config.lora has {a}: its "
                "adapters would be scaled otherwise than in training."
            )


def _same_scale(a, b):
    # PEFT's alpha is rounded where some projections are rank-stabilised and others aren't.
    return math.isclose(a.scale, b.scale, rel_tol=1e-9)


def _rules_of_run(spec):
    """config.lora of the workdir `spec`, ours or big_vision's; None if it is none or has none."""
    return _config_of_run(spec).get("lora") or None


def _config_of_run(spec):
    """config.json of the workdir `spec` as a dict; empty if it is no workdir."""
    if not isinstance(spec, str):
        return {}
    found = workdir.split_spec(spec)
    return workdir.read_config(found[0]) if found else bv.read_config(spec)


def load(config, checkpoint):
    """What answering questions takes: the model of `config` with the weights of `checkpoint`.

    Adapters are those of the checkpoint, or else of config.adapter_init. If there are none, the
    model is the plain one, whatever config.lora says, and a line on stderr tells so.

    Args:
      checkpoint: anything `checkpoints.load_params` takes.

    Returns:
      (model, tokenizer, mesh, params): params is the nested tree on the devices, every leaf in
      config.frozen_dtype, since nothing is trained (quantised ones have their scales beside them).
    """
    with config.unlocked():
        config.model_init = checkpoint
        if not config.get("lora") and not config.get("adapter_init") and _rules_of_run(checkpoint):
            config.lora = _rules_of_run(checkpoint)
    check_config(config)
    model, mesh = make_model(config), make_mesh(config)
    tok = make_tokenizer(config, model)
    abstract = abstract_params(config, model)
    host = load_host_params(checkpoint, abstract, config.get("resample_posemb"))
    if any(map(lora.is_factor, host)):
        adapter, its_start = config.get("adapter_init"), _config_of_run(checkpoint)
        if adapter and its_start.get("adapter_init") != _absolute(adapter):
            raise _two_adapters(config)
        _check_scales(config, model, checkpoint)
    elif config.get("adapter_init"):
        host |= load_host_adapter(config, model)
    elif model.lora:
        print(f"{checkpoint} has no adapters: config.lora is left out.", file=sys.stderr)
        model = model.clone(lora=())
    dtypes, shardings = param_dtypes(config, host, ()), param_shardings(config, abstract, mesh)
    kinds = param_kinds(config, abstract, ())
    return model, tok, mesh, unflatten_tree(place_params(host, dtypes, shardings, kinds))


def command(main):
    """`main` of a program, which tells mistakes that its user can mend in one sentence.

    With --verbosity=1 they keep their traceback, and the libraries below tell what they do.
    """

    @functools.wraps(main)
    def run(argv):
        talkative = flags.FLAGS["verbosity"].present
        if not talkative:
            logging.set_verbosity(logging.WARNING)  # Orbax tells its whole life at INFO.
        try:
            main(argv)
        except app.UsageError:
            raise
        except KeyboardInterrupt as e:
            code = getattr(e, "exit_code", None)
            if code is not None and not distributed.is_alone():  # agreed upon by all
                sys.exit(code)
            distributed.leave_at_once(code or 130)
        except Exception as e:
            known = isinstance(e, ValueError | OSError | FloatingPointError)
            if distributed.tell_if_peer_lost(e):
                distributed.leave(1)
            if (talkative and flags.FLAGS.verbosity > 0) or not known:
                if distributed.is_alone():
                    raise
                traceback.print_exc()
                distributed.leave(1)
            distributed.leave(f"error: {e}")

    return run


def parse_flags(argv):
    """`flags_parser` of the programs' app.run: a wrong --config=… or --config.key=… is told in a
    line, which absl and ml_collections tell by their tracebacks."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        # What get_config raised stands at the end of its traceback.
        last = str(e).strip().splitlines()[-1].strip()
        sys.exit(f"error: {last.removeprefix('ValueError: ') if 'Traceback' in str(e) else e}")
    except (AttributeError, KeyError) as e:
        paths = [a.partition("=")[0] for a in argv if a.startswith("--config.")]
        found = [p for p in paths if set(p.split(".")[1:]) & set(re.findall(r"\w+", str(e)))]
        near = re.search(r'Did you mean "(\w+)"', str(e))
        sys.exit(
            f"error: {found[0] if found else '--config.…'}: the config has no such key"
            + (f" (did you mean {near[1]!r}?)" if near else "")
            + ". Flags change only what its file sets; mend the name, or add the key to the file."
        )


def define_source_flags():
    """--config, --workdir, --checkpoint of the programs that answer questions; see `from_flags`.

    A function, so that only the program that runs defines them, not every module imported.
    """
    config_flags.DEFINE_config_file("config", None, "Experiment; default: the workdir's own.")
    flags.DEFINE_string("workdir", None, "Folder of a run.")
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Weights of any form, or a run; default: the workdir's newest.",
    )
    flags.DEFINE_string("adapter", None, "PEFT adapter directory to put on top of --checkpoint.")
    distributed.define_flags()


def from_flags():
    """(config, checkpoint) that those flags name; UsageError if they don't suffice.

    A checkpoint that is a run brings its own config, as --workdir does.
    """
    values = flags.FLAGS
    folder = values.workdir
    if folder is None and values.checkpoint and (run := workdir.split_spec(values.checkpoint)):
        folder = run[0]
    if folder is None and (values.config is None or values.checkpoint is None):
        raise app.UsageError("Give --workdir, or both --config and --checkpoint.")
    config = values.config or config_from_json(workdir.read_config(folder))
    if values.adapter:
        with config.unlocked():
            config.adapter_init, config.lora = values.adapter, None
    return config, values.checkpoint or values.workdir


def load_host_params(spec, abstract, resample_posemb=False):
    """Weights of any form that `checkpoints.open_init` takes, fitted to the model, on the host.

    Factors of adapters may be missing, but only all of them at once.

    Args:
      resample_posemb: take position embeddings of another resolution, and resample them.

    Returns:
      {name: array, which may still be in its file}.

    Raises:
      checkpoints.CheckpointError: the weights don't fit the model.
    """
    if isinstance(spec, ml_collections.ConfigDict):
        spec = spec.to_dict()
    loaded = checkpoints.open_init(spec)
    if not resample_posemb:
        _check_resolution(spec, flatten_tree(loaded), abstract)
    expected = abstract
    if not any(map(lora.is_factor, flatten_tree(loaded))):
        expected = {n: x for n, x in abstract.items() if not lora.is_factor(n)}
    try:
        fitted = checkpoints.match_params(loaded, unflatten_tree(expected))
    except npz.CheckpointError as e:
        raise npz.CheckpointError(f"{spec}: {e}") from None
    return flatten_tree(fitted)


def _check_resolution(spec, loaded, abstract):
    """The image tower has learned its positions on a grid of one size. Resampled to another, they
    work less well until they are trained on: a mistake, unless it's asked for."""
    name = "img/pos_embedding"
    found, expected = (getattr(x.get(name), "shape", ()) for x in (loaded, abstract))
    if len(found) != 3 or len(expected) != 3 or found[1] == expected[1]:
        return
    patch = abstract["img/embedding/kernel"].shape[0]
    has, wants = (f"{math.isqrt(shape[1]) * patch}" for shape in (found, expected))
    raise checkpoints.CheckpointError(
        f"{spec} was made for images of {has} px ({found[1]} positions), but config.res = {wants} "
        f"has {expected[1]}: set res={has} (config.res, and resize({has}) in the pp strings), take "
        "weights of that resolution, or set config.resample_posemb=True to have the position "
        "embeddings resampled."
    )


def place_params(host, dtypes, shardings, kinds=None):
    """{name: numpy array} → {name: jax.Array}; the host's copies are let go one by one.

    Of several processes each reads the weights, and copies to its devices what they hold of them.

    Args:
      kinds: of `param_kinds`: these become codes and scales (`quantise`).
    """
    out, kinds = {}, kinds or {}
    for name in list(host):
        array = np.asarray(host.pop(name))
        if name in kinds:
            where = quantise.stored(name, _with_sharding(array, shardings[name]), kinds[name])
            for n, x in quantise.quantise(name, array, kinds[name]).items():
                out[n] = distributed.place(x, where[n].sharding)
        else:
            out[name] = distributed.place(array.astype(dtypes[name]), shardings[name])
    return out


def _with_sharding(x, where, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where)


def stored_params(abstract, dtypes, shardings, kinds):
    """{name: jax.ShapeDtypeStruct with its sharding} of what `place_params` makes."""
    out = {}
    for name, x in abstract.items():
        x = _with_sharding(x, shardings[name], dtypes[name])
        out |= quantise.stored(name, x, kinds[name]) if name in kinds else {name: x}
    return out


def make_evaluators(config, model, tok, mesh, folder=None, checkpoint=None):
    """{name: (evaluator, its section of the config)} for config.evals, but for big_vision's own.

    Evaluators are `paligemma_med.evaluators.<type>.Evaluator`; what they write goes to
    <folder>/eval/<name>, and names `checkpoint` as the weights' origin, by default the folder.
    """
    out = {}
    for name, section in (config.get("evals") or {}).items():
        kw = {k: v for k, v in section.to_dict().items() if k not in config_values.WHEN}
        kind = kw.pop("type")
        if config_values.is_big_visions(section):
            if distributed.is_main():
                print(f"config.evals.{name} is big_vision's own: left out.", file=sys.stderr)
            continue
        if not re.fullmatch(r"\w+", kind):
            raise ValueError(f"config.evals.{name}.type is {kind!r}; expected a module name.")
        try:
            module = importlib.import_module(f"paligemma_med.evaluators.{kind}")
        except ModuleNotFoundError as e:
            if e.name != f"paligemma_med.evaluators.{kind}":
                raise
            raise ValueError(f"config.evals.{name}.type: there is no evaluator {kind!r}.") from None
        arguments = {*_arguments(module.Evaluator)}
        check_eval_keys(section, module.Evaluator, f"config.evals.{name}")
        if "about" in arguments:
            kw["about"] = functools.partial(about, dict(kw, type=kind), checkpoint or folder)
        outdir = os.path.join(folder, "eval", name) if folder else None
        try:
            inputs = input_pipeline.evaluation(kw.pop("data"), kw.pop("pp_fn"), kw.pop("batch_size"), mesh=mesh)
            if train_data := kw.pop("train_data", None):
                kw["train_data"] = _Answered(train_data, kw.pop("train_answer", "answer"))
            evaluator = module.Evaluator(model, tok, inputs=inputs, total=len(inputs), outdir=outdir, **kw)
        except ValueError as e:
            raise ValueError(f"config.evals.{name}: {e}") from e
        out[name] = (evaluator, section)
    return out


_EVAL_KEYS = ("type", "data", "pp_fn", "batch_size", "train_data", "train_answer", *config_values.WHEN)
_GIVEN = {"inputs", "total", "outdir", "about"}  # by make_evaluators


def check_eval_keys(section, evaluator, where):
    """ValueError if a section of config.evals has keys that this evaluator doesn't take."""
    known = {*_EVAL_KEYS, *_arguments(evaluator)} - _GIVEN
    config_values.check_keys(section, known, where)


def _arguments(evaluator):
    """Names of the keyword arguments that an evaluator takes."""
    found = inspect.signature(evaluator).parameters.values()
    return [p.name for p in found if p.kind == p.KEYWORD_ONLY]


def about(section, checkpoint, params, data=None):
    """What is evaluated, for metrics.json: split, data (what was opened; by this project's reader
    unless it is given), section (of the config), fingerprint (of the weights), versions,
    checkpoint, command. Collective."""
    flat = flatten_tree(params)
    names = sorted(flat)
    prints = fingerprint.of_leaves([flat[n] for n in names])
    data = data or input_pipeline.open_source(section["data"]).about()
    name = "/".join(filter(None, [data["name"], data.get("version")]))
    return dict(
        split=" ".join(filter(None, [name, data["split"]])),
        data=data,
        section=section,
        fingerprint=hashlib.sha256(json.dumps([names, prints]).encode()).hexdigest()[:32],
        versions=dict(paligemma_med=paligemma_med.__version__, jax=jax.__version__),
        checkpoint=checkpoint and _absolute(checkpoint),
        command=shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]),
    )


class _Answered:
    """Rows of the training split, their texts alone, one by one and as often as wanted; to the
    evaluator the truth is "answer", whatever its key in the data."""

    _KEYS = ("question_id", "question", "answer_type")

    def __init__(self, train_data, answer):
        self._source, self._answer = input_pipeline.open_source(train_data), answer
        for key in (answer, *self._KEYS):
            if key not in self._source.features:
                what = f"train_answer={answer!r}" if key == answer else "train_data"
                raise ValueError(f"{what}: {self._source} has no {key!r}, only {sorted(self._source.features)}")

    def __iter__(self):
        for row in self._source.columns((self._answer, *self._KEYS)):
            yield {**row, "answer": row[self._answer]}


def config_to_json(config):
    """The config as JSON text. Paths of weights are absolute, and a workdir's has its newest step
    (`workdir.pin`): they must be found, and remain what they are."""
    plain = json.loads(config.to_json_best_effort())
    init = plain.get("model_init")
    if isinstance(init, dict):
        plain["model_init"] = {k: _absolute(v) for k, v in init.items()}
    elif init:
        plain["model_init"] = _absolute(init)
    if plain.get("adapter_init"):
        plain["adapter_init"] = _absolute(plain["adapter_init"])
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def _absolute(spec):
    path, part = npz.split_spec(spec)
    path = os.path.abspath(os.path.expanduser(path))
    return bv.pin(workdir.pin(path)) + (f":{part}" if part else "")


def config_from_json(plain):
    """The reverse: a dict read from config.json → ConfigDict (lists of pairs stay lists)."""
    return ml_collections.ConfigDict(plain)


def describe_params(config, abstract, trained, mesh=None):
    """A table of all leaves: name, shape, stored type, trained by which rule or frozen, along which
    axes of the mesh each dimension is cut (and what stayed whole although it was to be cut), bytes
    on each device; totals.

    Args:
      abstract: {name: array or jax.ShapeDtypeStruct}.
      mesh: by default that of config.mesh.
    """
    mesh = mesh or make_mesh(config)
    dtypes = param_dtypes(config, abstract, trained)
    kinds = param_kinds(config, abstract, trained)
    rules = optim.schedule_rules(config)
    matched = optim.match_names(abstract, rules, "config.schedule")
    places = sharding.plan(abstract, _sharding_strategy(config), mesh)
    rows, totals = [], {"trained": [0, 0], "frozen": [0, 0]}
    for name, leaf in abstract.items():
        state = "trained" if name in trained else "frozen"
        place, note = places[name]
        parts = stored_params({name: leaf}, dtypes, {name: place}, kinds).values()
        here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in parts)
        totals[state][0] += leaf.size
        totals[state][1] += here
        shape = "×".join(map(str, leaf.shape))
        cut = sharding.short_spec(place) + (f" ({note})" if note else "")
        rule = rules[matched[name][0]][0]
        dtype = kinds.get(name) or str(dtypes[name])
        rows.append((name, shape, dtype, state, rule, cut, f"{here:,} B"))
    widths = [max(len(r[i]) for r in rows) for i in range(7)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    lines += [
        f"{n:>15,} parameters {state}, {size:,} bytes of them on each of {mesh.size} devices"
        for state, (n, size) in totals.items()
    ]
    return "\n".join(lines)
