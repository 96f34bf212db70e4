"""LoRA adapters in PEFT's form: adapter_config.json and adapter_model.safetensors in a folder.

Names of tensors and the config's fields are PEFT's (peft/tuners/lora/config.py,
peft/utils/save_and_load.py). What our model can't represent is refused, and so are missing or unexpected
keys, about which PEFT itself only warns and then computes something else.

Axis letters: L layers, I inputs and O outputs of a projection (heads flattened), R rank.
"""

import functools
import json
import os
import re

import ml_dtypes  # noqa: F401 (numpy knows "bfloat16" once it is imported, and safetensors needs that)
import numpy as np
import safetensors
import safetensors.numpy

from paligemma_med import files
from paligemma_med.checkpoints import finite, lazy, peft_config
from paligemma_med.checkpoints.adapter import Adapter
from paligemma_med.checkpoints.errors import CheckpointError, raise_all
from paligemma_med.checkpoints.hf import families
from paligemma_med.models import lora_targets
from paligemma_med.models.layers import lora

NAME = "PEFT"
CONFIG = peft_config.FILE
WEIGHTS = "adapter_model.safetensors"

# Versions of transformers whose module names can be written, for every model.
KEY_STYLES = sorted({style for family in families.FAMILIES.values() for style in family.STYLES})

# A state_dict as such, which MiniGPT-v2 and PeFoMed save, has the adapter's name as well.
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# timm's, and BLIP-2's in transformers: one layer for queries, keys and values.
_FUSED = re.compile(r"(?:.*\.)?(?:attn|self_attn)\.qkv")


# --- reading -----------------------------------------------------------------------------------


def is_adapter(path: os.PathLike | str) -> bool:
    """Whether a folder looks like a PEFT adapter's."""
    return os.path.isfile(os.path.join(path, CONFIG)) or os.path.isfile(os.path.join(path, WEIGHTS))


def load_adapter(folder: os.PathLike | str, *, allow_nonfinite: bool = False) -> Adapter:
    """Reads a PEFT adapter of a model that `hf.families` knows, under the names of any version of transformers.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      allow_nonfinite: whether factors may be NaN or infinite.

    Returns:
      Adapter; factors are numpy arrays in the types of the file. If the file doesn't show whether the
      language model has as many key heads as query heads, fewer are assumed; `insert_adapter` corrects
      that.

    Raises:
      FileNotFoundError: one of the two files is missing.
      CheckpointError: it isn't LoRA, or the model can't represent it; or keys are missing or unexpected, all
        of which are listed.
    """
    folder = os.path.expanduser(os.fspath(folder))
    config = peft_config.read(os.path.join(folder, CONFIG))
    path = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(path):
        hint = ""
        if os.path.isfile(os.path.join(folder, "adapter_model.bin")):
            hint = (
                "; adapter_model.bin next to it is pickled and never loaded: save the adapter again "
                "with safe_serialization=True"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{hint}")
    return of_tensors(path, config, _read_tensors(path), allow_nonfinite=allow_nonfinite)


def of_tensors(path: str, config: dict, tensors: dict[str, np.ndarray], *, allow_nonfinite: bool = False) -> Adapter:
    """The adapter of factors under PEFT's names, scaled as `config` says (`peft_config.read`). path: for messages."""
    names = [match[1] for key in tensors if (match := _KEY.fullmatch(key))]
    if fused := next(filter(_FUSED.fullmatch, names), None):
        raise CheckpointError(
            f"{path}: {fused} is one layer for queries, keys and values, which have one A there and each its own here: "
            "train the adapter on the tower of transformers' ViTModel"
        )
    family = families.of_modules(names)
    modules = _modules_in(path, tensors, family)
    _check_complete(path, config, modules, family)
    if not allow_nonfinite:
        for key, tensor in tensors.items():
            finite.check(tensor, f"{path}: {key}")
    specs, factors = {}, {}
    for target, layers in _by_target(modules, family).items():
        specs[target] = _one_spec(path, config, layers)
        a = np.stack([np.asarray(pair["A"]).T for _, pair in layers])
        b = np.stack([np.asarray(pair["B"]).T for _, pair in layers])
        factors[target] = a, b
    return _in_one_kernel(Adapter(specs, factors))


def _read_tensors(path):
    """{key: numpy array} of a safetensors file."""
    try:
        with safetensors.safe_open(path, "np") as f:
            return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (f is no mapping)
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, AttributeError) as e:
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
    """{canonical name of a module: what it adapts}, with q, k and v as separate kernels."""
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
        if not peft_config.is_targeted(config, m["name"])
        for f in "AB"
    ]
    depth = {}  # of each part that has adapters
    module_of = families.modules_of(family)
    for target, layer in modules:
        part = module_of[target].partition(".")[0]
        depth[part] = max(depth.get(part, 0), layer or 0)
    names_of = _namings(modules, family)
    for module, target in _targets(family).items():
        part = module.partition(".")[0]
        layers = range(depth.get(part, 0) + 1) if target.stacked else [None]
        for layer in layers:
            if (target, layer) in modules:
                continue
            names = [named(module.replace("{i}", str(layer))) for named in names_of]
            if all(peft_config.is_targeted(config, n) for n in names):
                shown = names[0] if part in depth else names_of[0](module.replace("{i}", "*"))
                problems += [f"{_key(shown, f)}: missing, target_modules matches it" for f in "AB"]
    raise_all(problems, path, 2 * len(modules))


def _namings(modules, family):
    """Functions from canonical to whole names: the ways in which the file may name modules that it doesn't have. A part
    without any adapter may be named in every style that the other parts allow."""
    found = {module["name"]: family.canonical(module["name"]) for module in modules.values()}

    def prefixed(name, style, start):
        return start + families.in_style(family, name, style)

    out = []
    for style in family.STYLES:
        ends = {name: families.in_style(family, canonical, style) for name, canonical in found.items()}
        start, *others = {name.removesuffix(end) for name, end in ends.items()}
        if not others and all(map(str.endswith, ends, ends.values())):
            out.append(functools.partial(prefixed, style=style, start=start))
    if out:
        return out
    prefixes = {}  # of each part
    for name, canonical in found.items():
        part = canonical.partition(".")[0]
        prefixes[part] = name.removesuffix(canonical.removeprefix(part))

    def named(name, style):
        part, _, rest = name.partition(".")
        return f"{prefixes[part]}.{rest}" if part in prefixes else families.in_style(family, name, style)

    return [functools.partial(named, style=style) for style in family.STYLES]


def _by_target(modules, family):
    """{target: [(layer, module), …]} in the order of TARGETS and layers."""
    out = {t: [] for t in _targets(family).values()}
    for target, layer in sorted(modules, key=lambda place: place[1] or 0):
        out[target].append((layer, modules[target, layer]))
    return {t: layers for t, layers in out.items() if layers}


def _one_spec(path, config, layers):
    """The Spec that all layers of a target share; shapes are checked too."""
    found = {}
    for _, module in layers:
        name = module["name"]
        rank = peft_config.by_pattern(config.get("rank_pattern"), name, config["r"])
        alpha = peft_config.by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
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


def _in_one_kernel(adapter):
    """The adapter, with q, k and v in one kernel if the factors show as many key heads as query heads."""
    widths = {}  # {(part, letters of axes): the sizes that the factors have for these axes as one}
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
    key_style: str | None = None,
    model_type: str = "paligemma",
    overwrite: bool = False,
    card: str | None = None,
) -> None:
    """Writes an adapter as a PEFT folder, which appears whole or not at all.

    Args:
      folder: the folder to write.
      adapter: what to write.
      base_model: name or path of the Hugging Face model it belongs to, for base_model_name_or_path.
      dtype: floats are cast to it ("float32", "bfloat16", …); None leaves them.
      key_style: the version of transformers whose module names are used, one of KEY_STYLES; None: 4.52, or the newest
        of a model that had no names of its own then. What `PeftModel.from_pretrained` can load of PaliGemma, tried with
        random adapters everywhere in both towers, transformers 4.51 to 5.23 and PEFT 0.15 to 0.21 ("-": it warns about
        missing keys and continues without them):

          style   transformers < 4.52   4.52 to 5.0   5.8 and later
          "4.41"  any PEFT              PEFT >= 0.16  PEFT >= 0.20, but not the projector
          "4.52"  -                     any PEFT      PEFT >= 0.20
          "5"     -                     -             any PEFT

        Gemma 3 is named alike. A ViTModel has other names from 5 on, and then takes no others. Those of LLaMA and BLOOM
        never changed.

      model_type: the Hugging Face model's, a key of `hf.families.FAMILIES`.
      overwrite: replace an older adapter there.
      card: text of README.md, the model card; None writes none.

    The config says how the adapter was trained: rank and alpha of most targets, and of the others in
    rank_pattern and alpha_pattern. PEFT has no per-module setting for two things: of different dropouts the
    most common is written, with a warning; if only some targets have rslora, the minority's alpha is changed
    so that their scale stays the same.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is False, or it isn't an adapter.
      CheckpointError: the adapter is empty, or adapts what is no module of that model; or key_style is unknown.
    """
    folder = os.path.expanduser(os.fspath(folder))
    family = families.FAMILIES[model_type]
    if key_style not in (None, *family.STYLES, *KEY_STYLES):
        raise CheckpointError(f"key_style is {key_style!r}; expected one of {KEY_STYLES}")
    modules = families.modules_of(family)
    if strange := [t.name for t in adapter.specs if t not in modules]:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise CheckpointError(
            f"the adapter has factors of {strange[0]}{more}, which is no linear layer by itself in transformers' "
            f"{family.NAME}: merge them into the weights (--merge)"
        )
    style = _default_style(family) if key_style is None else families.style_of(family, key_style)
    if not adapter.specs or set(adapter.specs) != set(adapter.factors):
        raise CheckpointError(
            f"the adapter has {len(adapter.specs)} specs and {len(adapter.factors)} pairs of "
            "factors; expected one or more of both, of the same targets"
        )
    dtype = lazy.dtype_of(dtype)
    specs = {t: adapter.specs[t] for t in lora_targets.TARGETS if t in adapter.specs}
    config = peft_config.make(specs, base_model, family)
    tensors = {}
    for target in specs:
        a, b = adapter.factors[target]
        module_in_style = families.in_style(family, modules[target], style)
        for layer in range(len(a)):
            module = module_in_style.replace("{i}", str(layer))
            for factor, x in (("A", a), ("B", b)):
                x = np.asarray(x[layer]).T
                tensors[_key(module, factor)] = np.ascontiguousarray(x, dtype or x.dtype)
    with files.whole_folder(folder, replaces=(CONFIG,) if overwrite else None) as temporary:
        # Not save_file, whose files only their owner may read.
        with open(os.path.join(temporary, WEIGHTS), "wb") as f:
            f.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        with open(os.path.join(temporary, CONFIG), "w", encoding="utf-8") as f:
            f.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if card is not None:
            files.write_text(os.path.join(temporary, "README.md"), card)


def _default_style(family):
    return "4.52" if "4.52" in family.STYLES else families.style_of(family, KEY_STYLES[-1])
