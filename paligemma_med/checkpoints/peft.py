"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors in a folder.

Names of tensors and the config's fields are those of PEFT (peft/tuners/lora/config.py,
peft/utils/save_and_load.py). What it holds and the model here can't represent is refused, and so
are keys too many or too few: PEFT itself only warns of them, and then computes something else.

Axis letters: L layers, I inputs and O outputs of a projection (heads flattened), R rank.
"""

import collections
import functools
import json
import math
import os
import re

import ml_dtypes  # noqa: F401 (numpy knows "bfloat16" once it is imported, and safetensors needs that)
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from paligemma_med import files
from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.adapter import Adapter
from paligemma_med.checkpoints.errors import CheckpointError, raise_all
from paligemma_med.checkpoints.hf import families
from paligemma_med.models import lora_targets
from paligemma_med.models.layers import lora

NAME = "PEFT"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Versions of transformers whose names of modules can be written, whatever the model.
KEY_STYLES = sorted({style for family in families.FAMILIES.values() for style in family.STYLES})

_ALL_LINEAR = "all-linear"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_ENDS_IN = r"(.*\.)?({})$"  # how keys of rank_pattern and alpha_pattern are meant

# Fields that say nothing about what the adapter computes once it is trained.
_IDLE = frozenset(
    """
    auto_mapping base_model_name_or_path revision inference_mode task_type peft_version
    runtime_config megatron_config megatron_core ensure_weight_tying qalora_group_size
    loftq_config eva_config corda_config lora_ga_config
    """.split()
)
# Fields that are read here.
_READ = frozenset(
    """
    peft_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules
    exclude_modules bias init_lora_weights
    """.split()
)
# Ways to begin after which the base's weights are no longer what they were.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


# --- reading -----------------------------------------------------------------------------------


def is_adapter(path) -> bool:
    """Whether a folder looks like a PEFT adapter's."""
    return os.path.isfile(os.path.join(path, CONFIG)) or os.path.isfile(os.path.join(path, WEIGHTS))


def load_adapter(folder: os.PathLike | str) -> Adapter:
    """Reads a PEFT adapter of a model that `hf.families` knows, under the names of any version of transformers.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
      Adapter; factors are numpy arrays in the types of the file. Where the file doesn't tell
      whether the language model has as many key heads as query heads, fewer are supposed;
      `insert_adapter` puts it right.

    Raises:
      FileNotFoundError: one of the two files isn't there.
      CheckpointError: it isn't LoRA, or of a kind that the model can't represent; or keys are
        missing or unexpected, all of which are listed.
    """
    folder = os.path.expanduser(os.fspath(folder))
    config = _read_config(os.path.join(folder, CONFIG))
    path = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(path):
        hint = ""
        if os.path.isfile(os.path.join(folder, "adapter_model.bin")):
            hint = (
                "; adapter_model.bin beside it is pickled and never loaded: save the adapter anew "
                "with safe_serialization=True"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{hint}")
    tensors = _read_tensors(path)
    family = families.of_modules([match[1] for key in tensors if (match := _KEY.fullmatch(key))])
    modules = _modules_in(path, tensors, family)
    _check_complete(path, config, modules, family)
    specs, factors = {}, {}
    for target, layers in _by_target(modules, family).items():
        specs[target] = _one_spec(path, config, layers)
        a = np.stack([np.asarray(pair["A"]).T for _, pair in layers])
        b = np.stack([np.asarray(pair["B"]).T for _, pair in layers])
        factors[target] = a, b
    return _in_one_kernel(Adapter(specs, factors))


def _read_config(path):
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing: expected a PEFT adapter's folder") from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(config).__name__}")

    def refuse(key, expected):
        raise CheckpointError(f"{path}: {key} is {config.get(key)!r}; expected {expected}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA', no other kind is known here")
    for key, value in config.items():
        if key not in _IDLE | _READ and value not in (None, False, [], {}, ""):
            refuse(key, "none: the model here has nothing like it")
    if config.get("bias", "none") != "none":
        refuse("bias", "'none': biases aren't trained here")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        refuse(
            "init_lora_weights",
            "one that leaves the base as it is; PEFT converts such adapters in save_pretrained("
            "…, path_initial_model_for_weight_conversion=…)",
        )
    if not _is_whole(config.get("r")):
        refuse("r", "a whole number, 1 or more")
    for key in ("lora_alpha", "lora_dropout"):
        if not _is_number(config.get(key, 0)):
            refuse(key, "a number")
    for key, check in (("rank_pattern", _is_whole), ("alpha_pattern", _is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(check, pattern.values())):
            refuse(key, "an object of numbers")
        for regex in pattern:
            _check_regex(path, key, _ENDS_IN.format(regex))
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key)
        if isinstance(names, str):
            _check_regex(path, key, names)
        elif names and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            refuse(key, "a list of names or a regex")
    if not config.get("target_modules"):
        refuse("target_modules", "a list of names or a regex")
    return config


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_whole(x):
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _check_regex(path, key, regex):
    try:
        re.compile(regex)
    except re.error as e:
        raise CheckpointError(f"{path}: {key} {regex!r} is not a regular expression: {e}") from None


def _read_tensors(path):
    """{key: numpy array} of a safetensors file."""
    try:
        with safetensors.safe_open(path, "np") as f:
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (f is no mapping)
    except (safetensors.SafetensorError, OSError, TypeError) as e:
        raise CheckpointError(
            f"{path} ({os.path.getsize(path):,} bytes) is not a readable safetensors file; it may "
            f"be cut short or something else (safetensors says: {e})"
        ) from e


def _modules_in(path, tensors, family):
    """{(target, layer or None): dict(name=…, A=…, B=…)} of a file's tensors."""
    modules, problems = {}, []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        place = _place_of(match[1], family) if match else None
        if place is None:
            problems.append(f"{key}: unexpected, nothing that is adapted here has that name")
            continue
        module = modules.setdefault(place, dict(name=match[1]))
        if module["name"] != match[1]:
            problems.append(f"{key}: unexpected, {module['name']} is the same module")
        elif len(tensor.shape) != 2:
            problems.append(f"{key}: expected a matrix, found shape {tuple(tensor.shape)}")
        elif not lazy.is_float(tensor.dtype):
            problems.append(f"{key}: expected floats, found {tensor.dtype}")
        module[match[2]] = tensor
    gaps = [_key(m["name"], f) for m in modules.values() for f in "AB" if f not in m]
    problems += [f"{key}: missing" for key in gaps]
    raise_all(problems, path, len(tensors) + len(gaps))
    if not modules:
        raise CheckpointError(f"{path} holds no tensors")
    return modules


def _key(module, factor):
    return f"base_model.model.{module}.lora_{factor}.weight"


@functools.cache
def _targets(family):
    """{canonical name of a module: what it adapts}; of a projection that our models keep in one kernel or in several,
    the form of several."""
    out = {}
    for target, module in families.modules_of(family).items():
        out.setdefault(module, target)
    return out


def _place_of(name, family):
    """(target, layer or None) of a module's name, or None."""
    for module, target in _targets(family).items():
        regex = re.escape(module).replace(re.escape("{i}"), r"(0|[1-9]\d{0,3})")
        if match := re.fullmatch(regex, family.canonical(name)):
            return target, int(match[1]) if match.groups() else None
    return None


def _check_complete(path, config, modules, family):
    """Raises CheckpointError unless the modules are those that target_modules names."""
    problems = [
        f"{_key(m['name'], f)}: unexpected, target_modules doesn't match it"
        for m in modules.values()
        if not _is_targeted(config, m["name"])
        for f in "AB"
    ]
    depth, prefixes = {}, {}  # of each part that has adapters
    module_of = families.modules_of(family)
    for (target, layer), module in modules.items():
        part = module_of[target].partition(".")[0]
        depth[part] = max(depth.get(part, 0), layer or 0)
        rest = family.canonical(module["name"]).removeprefix(part)
        prefixes[part] = module["name"].removesuffix(rest)
    # A part without any adapter may bear its name in each style that the others allow.
    styles = [s for s in family.STYLES.values() if prefixes.items() <= s.items()] or [
        {**s, **prefixes} for s in family.STYLES.values()
    ]
    for module, target in _targets(family).items():
        part, _, rest = module.partition(".")
        layers = range(depth.get(part, 0) + 1) if target.stacked else [None]
        for layer in layers:
            if (target, layer) in modules:
                continue
            names = [f"{s[part]}.{rest}".replace("{i}", str(layer)) for s in styles]
            if all(_is_targeted(config, n) for n in names):
                shown = names[0]
                if part not in depth:
                    shown = f"{styles[0][part]}.{rest}".replace("{i}", "*")
                problems += [f"{_key(shown, f)}: missing, target_modules matches it" for f in "AB"]
    raise_all(problems, path, 2 * len(modules))


def _is_targeted(config, name):
    """Whether PEFT would adapt the module `name` (peft/tuners/tuners_utils.py).

    A string is a regex for the whole name; an entry of a list is the name or its end from a dot on.
    """

    def among(names):
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
        return any(name == n or name.endswith(f".{n}") for n in names or ())

    wanted = config["target_modules"]
    if isinstance(wanted, str) and wanted.lower() == _ALL_LINEAR:
        wanted = ".*"
    return among(wanted) and not among(config.get("exclude_modules"))


def _by_target(modules, family):
    """{target: [(layer, module), …]} in the order of TARGETS and layers."""
    out = {t: [] for t in _targets(family).values()}
    for target, layer in sorted(modules, key=lambda place: place[1] or 0):
        out[target].append((layer, modules[target, layer]))
    return {t: layers for t, layers in out.items() if layers}


def _one_spec(path, config, layers):
    """The Spec that all layers of a target have; shapes are checked too."""
    found = {}
    for _, module in layers:
        name = module["name"]
        rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        a, b = tuple(module["A"].shape), tuple(module["B"].shape)
        if (a[0], b[1]) != (rank, rank):
            raise CheckpointError(
                f"{path}: {name} has A of shape {a} and B of shape {b}, but {CONFIG} gives it rank {rank}"
            )
        found.setdefault((rank, alpha, a, b), name)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise CheckpointError(
            f"{path}: {one} and {other} differ in rank, alpha or shape; layers have to be alike, "
            "since they are stacked here"
        )
    rank, alpha, _, _ = next(iter(found))
    try:
        return lora.Spec(rank, alpha, config.get("lora_dropout", 0.0), bool(config.get("use_rslora", False)))
    except ValueError as e:
        raise CheckpointError(f"{os.path.join(os.path.dirname(path), CONFIG)}: {e}") from None


def _by_pattern(pattern, name, default):
    """PEFT's rule: of the keys that match the name's end from a dot on, the first counts."""
    for regex, value in (pattern or {}).items():
        if re.match(_ENDS_IN.format(regex), name):
            return value
    return default


def _in_one_kernel(adapter):
    """The adapter with queries, keys and values as parts of one kernel, where there are as many heads of keys as of
    queries, as far as the factors tell."""
    widths = {}  # of heads, by the letters of their axes: what flat sizes the factors have
    for target, (a, b) in adapter.factors.items():
        part = target.param.partition("/")[0]
        widths.setdefault((part, target.inputs), set()).add(a.shape[1])
        widths.setdefault((part, target.outputs), set()).add(b.shape[-1])

    def form(target):
        part = target.param.partition("/")[0]
        queries, keys = (widths.get((part, letters)) for letters in ("NH", "KH"))
        return lora_targets.TWINS[target] if target in lora_targets.TWINS and queries and queries == keys else target

    return Adapter(
        {form(t): s for t, s in adapter.specs.items()},
        {form(t): f for t, f in adapter.factors.items()},
    )


# --- writing -----------------------------------------------------------------------------------


def save_adapter(
    folder: os.PathLike | str,
    adapter: Adapter,
    *,
    base_model: str | None = None,
    dtype: str | None = None,
    key_style: str = "4.52",
    model_type: str = "paligemma",
    overwrite: bool = False,
) -> None:
    """Writes an adapter as a PEFT folder, which appears whole or not at all.

    Args:
      folder: to be made.
      adapter: what to write.
      base_model: name or path of the Hugging Face model it belongs to, for base_model_name_or_path.
      dtype: floats are cast to it ("float32", "bfloat16", …); None leaves them.
      key_style: which transformers' names the modules get, one of KEY_STYLES. What
        `PeftModel.from_pretrained` makes of them, tried with random adapters everywhere in both
        towers, transformers 4.51 to 5.23 and PEFT 0.15 to 0.21 ("-": it warns of missing keys and
        goes on without them):

          style   transformers < 4.52   4.52 to 5.0   5.8 and later
          "4.41"  any PEFT              PEFT >= 0.16  PEFT >= 0.20, but not the projector
          "4.52"  -                     any PEFT      PEFT >= 0.20
          "5"     -                     -             any PEFT

      model_type: of the Hugging Face model, a key of `hf.families.FAMILIES`.
      overwrite: replace an older adapter there.

    The config says how the adapter was trained: rank and alpha of most targets, of others in
    rank_pattern and alpha_pattern. Two things PEFT can't be told per module: of different dropouts
    the commonest is written, with a warning; where some targets have rslora, alpha is changed for
    the fewer, so that their scale is what it was.

    Raises:
      FileExistsError: `folder` is there and is not to be overwritten, or is not an adapter's.
      CheckpointError: the adapter is empty, or key_style unknown.
    """
    folder = os.path.expanduser(os.fspath(folder))
    family = families.FAMILIES[model_type]
    if key_style not in family.STYLES:
        raise CheckpointError(f"key_style is {key_style!r}; expected one of {sorted(family.STYLES)}")
    if not adapter.specs or set(adapter.specs) != set(adapter.factors):
        raise CheckpointError(
            f"the adapter has {len(adapter.specs)} specs and {len(adapter.factors)} pairs of "
            "factors; expected one or more of both, of the same targets"
        )
    dtype = lazy.dtype_of(dtype)
    specs = {t: adapter.specs[t] for t in lora_targets.TARGETS if t in adapter.specs}
    config = _make_config(specs, base_model, family)
    tensors = {}
    for target in specs:
        a, b = adapter.factors[target]
        module_in_style = families.in_style(family, families.modules_of(family)[target], key_style)
        for layer in range(len(a)):
            module = module_in_style.replace("{i}", str(layer))
            for factor, x in (("A", a), ("B", b)):
                x = np.asarray(x[layer]).T
                tensors[_key(module, factor)] = np.ascontiguousarray(x, dtype or x.dtype)
    with files.whole_folder(folder, replaces=(CONFIG,) if overwrite else None) as temporary:
        # Not save_file, whose files nobody but their owner may read.
        with open(os.path.join(temporary, WEIGHTS), "wb") as f:
            f.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        with open(os.path.join(temporary, CONFIG), "w", encoding="utf-8") as f:
            f.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _make_config(specs, base_model, family):
    rslora = _commonest([s.rslora for s in specs.values()])
    dropout = _commonest([s.dropout for s in specs.values()])
    if others := sorted({s.dropout for s in specs.values()} - {dropout}):
        logging.warning(
            "PEFT has one dropout for all modules: %s is written; some of the adapter's have %s.",
            dropout,
            others,
        )
    ranks = {t: s.rank for t, s in specs.items()}
    alphas = {t: _alpha(s, rslora) for t, s in specs.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    end_of = _ends(family)
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        rank_pattern={end_of[t]: r for t, r in ranks.items() if r != rank},
        alpha_pattern={end_of[t]: a for t, a in alphas.items() if a != alpha},
        target_modules=rf"(.*\.)?({'|'.join(end_of[t] for t in specs)})",
        bias="none",
        fan_in_fan_out=False,
        init_lora_weights=True,
    )


def _commonest(values):
    return collections.Counter(values).most_common(1)[0][0]


def _alpha(spec, rslora):
    """Alpha that gives the spec's scale with or without rslora; a whole number as int."""
    alpha = spec.alpha
    if spec.rslora != rslora:
        alpha = spec.scale * (math.sqrt(spec.rank) if rslora else spec.rank)
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _ends(family):
    r"""{target: regex of the end of its module's name, in every style and for each layer}.

    It begins behind a dot in each of them, as older PEFT wants it. A part whose modules could be taken for another's
    without its name has that in front: "layers.0.self_attn.q_proj" ends like "encoder.layers.0.self_attn.q_proj".
    """
    modules = {target: module.partition(".")[::2] for target, module in families.modules_of(family).items()}
    names = {}  # {part: last words of what the styles call it}
    for part, rest in modules.values():
        if any(other.endswith(f".{rest}") for other_part, other in modules.values() if other_part != part):
            names[part] = sorted({style[part].rpartition(".")[2] for style in family.STYLES.values()})
    ends = {}
    for target, (part, rest) in modules.items():
        rest = re.escape(rest).replace(re.escape("{i}"), r"\d+")
        ends[target] = rf"({'|'.join(names[part])})\.{rest}" if part in names else rest
    return ends
