"""From a config to the things it names: model, tokenizer, mesh, weights, evaluators.

Every entry point (train, evaluate, predict) starts here, so that they agree on what a config means.
"""

import functools
import importlib
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from paligemma_med import checkpoints, input_pipeline, optim, sharding
from paligemma_med.checkpoints import npz, workdir
from paligemma_med.models import paligemma
from paligemma_med.pp import tokenizer

# Keys of a config. An unknown one is a typo more often than not, and is refused.
KEYS = frozenset(
    """
    seed res text_len tokenizer
    model model_init dtype frozen_dtype attn_impl
    input total_steps total_epochs total_examples
    optax_name optax lr lr_mults wd wd_mults schedule grad_clip_norm grad_accum_steps
    label_smoothing loss_norm supervised_len
    mesh sharding_strategy
    log_training_steps log_training_epochs log_training_percent
    ckpt_steps ckpt_epochs ckpt_percent keep_ckpt
    evals predict_pp
    """.split()
)


def check_config(config):
    """Refuses configs with unknown or missing keys; ValueError names them."""
    if unknown := sorted(set(config) - KEYS):
        raise ValueError(f"config has unknown keys {unknown}; known are {sorted(KEYS)}.")
    if missing := [k for k in ("model", "res", "text_len", "tokenizer") if k not in config]:
        raise ValueError(f"config lacks {missing}.")


def make_model(config):
    """The `paligemma.Model` of config.model, with activations in config.dtype."""
    return paligemma.Model(
        dtype=config.get("dtype", "float32"),
        attn_impl=config.get("attn_impl", "xla"),
        **config.model.to_dict(),
    )


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
    return sharding.make_mesh(config.get("mesh", [("data", -1)]))


def abstract_params(config, model):
    """{name: jax.ShapeDtypeStruct} of all parameters, float32."""
    return npz.flatten_tree(paligemma.abstract_params(model, image_size=config.res))


def param_dtypes(config, names, trained):
    """{name: dtype}: trained leaves float32, frozen ones config.frozen_dtype."""
    frozen = jnp.dtype(config.get("frozen_dtype", "float32"))
    trained = set(trained)
    return {n: jnp.dtype("float32") if n in trained else frozen for n in names}


def param_shardings(config, abstract, mesh):
    """{name: NamedSharding} by config.sharding_strategy; by default a copy on every device."""
    rules = config.get("sharding_strategy", [(".*", "replicate")])
    return sharding.infer_sharding(abstract, rules, mesh)


def initial_params(config, model, mesh, *, dtypes=None):
    """The parameters training starts from, on the devices.

    They come from config.model_init, or are random by config.seed if that is None. Weights from
    files go to the devices leaf by leaf, each in its type.

    Returns:
      {name: jax.Array}, sharded by config.sharding_strategy.
    """
    abstract = abstract_params(config, model)
    shardings = param_shardings(config, abstract, mesh)
    dtypes = dtypes or param_dtypes(config, abstract, abstract)
    if config.get("model_init"):
        return place_params(load_host_params(config.model_init, abstract), dtypes, shardings)

    def init():
        tree = paligemma.init_params(model, jax.random.key(config.get("seed", 0)),
                                     image_size=config.res)  # fmt: skip
        return {n: x.astype(dtypes[n]) for n, x in npz.flatten_tree(tree).items()}

    return jax.jit(init, out_shardings=shardings)()


def load(config, checkpoint):
    """What answering questions takes: the model of `config` with the weights of `checkpoint`.

    Args:
      checkpoint: anything `checkpoints.load_params` takes.

    Returns:
      (model, tokenizer, mesh, params): params is the nested tree on the devices, every leaf in
      config.frozen_dtype, since nothing is trained.
    """
    check_config(config)
    model, mesh = make_model(config), make_mesh(config)
    tok = make_tokenizer(config, model)
    with config.unlocked():
        config.model_init = checkpoint
    dtypes = param_dtypes(config, abstract_params(config, model), ())
    params = npz.unflatten_tree(initial_params(config, model, mesh, dtypes=dtypes))
    return model, tok, mesh, params


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
        except (ValueError, OSError, FloatingPointError) as e:
            if talkative and flags.FLAGS.verbosity > 0:
                raise
            sys.exit(f"error: {e}")
        except KeyboardInterrupt:
            sys.exit(130)

    return run


def define_source_flags():
    """--config, --workdir, --checkpoint of the programs that answer questions; see `from_flags`.

    A function, so that only the program that runs defines them, not every module imported.
    """
    config_flags.DEFINE_config_file("config", None, "Experiment; default: the workdir's own.")
    flags.DEFINE_string("workdir", None, "Folder of a run.")
    flags.DEFINE_string("checkpoint", None, "Weights of any form; default: the workdir's newest.")


def from_flags():
    """(config, checkpoint) that those flags name; UsageError if they don't suffice."""
    values = flags.FLAGS
    if values.workdir is None and (values.config is None or values.checkpoint is None):
        raise app.UsageError("Give --workdir, or both --config and --checkpoint.")
    config = values.config or config_from_json(workdir.read_config(values.workdir))
    return config, values.checkpoint or values.workdir


def load_host_params(spec, abstract):
    """Weights of any form that `checkpoints.load_init` takes, fitted to the model, on the host."""
    if isinstance(spec, ml_collections.ConfigDict):
        spec = spec.to_dict()
    loaded = checkpoints.load_init(spec)
    try:
        fitted = checkpoints.match_params(loaded, npz.unflatten_tree(abstract))
    except npz.CheckpointError as e:
        raise npz.CheckpointError(f"{spec}: {e}") from None
    return npz.flatten_tree(fitted)


def place_params(host, dtypes, shardings):
    """{name: numpy array} → {name: jax.Array}; the host's copies are let go one by one."""
    out = {}
    for name in list(host):
        out[name] = jax.device_put(host.pop(name).astype(dtypes[name]), shardings[name])
    return out


def make_evaluators(config, model, tok, mesh, folder=None):
    """{name: (evaluator, its section of the config)} for config.evals.

    Evaluators are `paligemma_med.evaluators.<type>.Evaluator`; what they write goes to
    <folder>/eval/<name>.
    """
    out = {}
    for name, section in (config.get("evals") or {}).items():
        kw = {k: v for k, v in section.to_dict().items() if not _WHEN.fullmatch(k)}
        kind = kw.pop("type")
        if not re.fullmatch(r"\w+", kind):
            raise ValueError(f"config.evals.{name}.type is {kind!r}; expected a module name.")
        try:
            module = importlib.import_module(f"paligemma_med.evaluators.{kind}")
        except ModuleNotFoundError as e:
            if e.name != f"paligemma_med.evaluators.{kind}":
                raise
            raise ValueError(f"config.evals.{name}.type: there is no evaluator {kind!r}.") from None
        outdir = os.path.join(folder, "eval", name) if folder else None
        if missing := [k for k in ("data", "pp_fn", "batch_size") if k not in kw]:
            raise ValueError(f"config.evals.{name} lacks {missing}.")
        inputs = input_pipeline.evaluation(
            kw.pop("data"), kw.pop("pp_fn"), kw.pop("batch_size"), mesh=mesh
        )
        if train_data := kw.pop("train_data", None):
            source = input_pipeline.open_source(train_data)
            kw["train_data"] = (source[i] for i in range(len(source)))
        evaluator = module.Evaluator(
            model, tok, inputs=inputs, total=len(inputs), outdir=outdir, **kw
        )
        out[name] = (evaluator, section)
    return out


# Keys of an evals section that say when it runs rather than what.
_WHEN = re.compile(r"log_(steps|epochs|examples|percent)|skip_first")


def config_to_json(config):
    """The config as JSON text; a path in model_init is made absolute, so that it can be found."""
    plain = json.loads(config.to_json_best_effort())
    init = plain.get("model_init")
    if isinstance(init, dict):
        plain["model_init"] = {k: _absolute(v) for k, v in init.items()}
    elif init:
        plain["model_init"] = _absolute(init)
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def _absolute(spec):
    path, part = npz.split_spec(spec)
    return os.path.abspath(os.path.expanduser(path)) + (f":{part}" if part else "")


def config_from_json(plain):
    """The reverse: a dict read from config.json → ConfigDict (lists of pairs stay lists)."""
    return ml_collections.ConfigDict(plain)


def describe_params(config, abstract, trained):
    """A table of all leaves: name, shape, stored type, trained by which rule or frozen; totals."""
    dtypes = param_dtypes(config, abstract, trained)
    rules = optim.schedule_rules(config)
    matched = optim.match_names(abstract, rules, "config.schedule")
    rows, totals = [], {"trained": 0, "frozen": 0}
    for name, leaf in abstract.items():
        state = "trained" if name in trained else "frozen"
        totals[state] += leaf.size
        shape = "×".join(map(str, leaf.shape))
        rows.append((name, shape, str(dtypes[name]), state, rules[matched[name][0]][0]))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    lines += [f"{n:>15,} parameters {state}" for state, n in totals.items()]
    return "\n".join(lines)
