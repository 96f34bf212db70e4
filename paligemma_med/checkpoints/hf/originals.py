"""Parts of other systems, in files whose tensors' names say what they are: no config.json, or one of a whole system.

Image towers (open_clip's BiomedCLIP; EVA as LAVIS and MiniGPT have it; BLIP-2's), BLIP-2's query transformer and what
leads into a language model. A file may hold several. Shapes give the sizes, but not into how many heads a width is cut.
Pickles are no such files: `tools.torch_to_safetensors` makes safetensors of them.

Sources of names: open_clip (timm_model.py) and timm (vision_transformer.py); LAVIS, models/eva_vit.py and
models/blip2_models; MiniGPT-4, minigpt4/models; LLaVA, model/llava_arch.py; transformers, models/blip_2.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError, listed
from paligemma_med.checkpoints.hf import assemble, config, families, gemma3, qformer, tensors, towers
from paligemma_med.checkpoints.hf.layout import Row, by_path
from paligemma_med.models.leaves import unflatten_tree

# eva_vit_g.pth has one layer more than LAVIS and MiniGPT build of it.
EVA_LAYERS = 39


class _Group(NamedTuple):
    """A part under certain names.

    Attributes:
      part: "img", "connector".
      mark: the canonical name by which a file that has it is known.
      own: a regex of all names that belong to it. Others may be in the file, but none of these that isn't known.
      rows: from the file's canonical names to the rows.
      unread: regexes of names that our part has no place for.
      most: layers, at most.
      more: from (path, our leaves, {canonical name: Tensor}, {letter: length}) to leaves that join or replace them.
    """

    name: str
    part: str
    mark: str
    own: str
    rows: Callable[[Iterable[str]], Iterable[Row]]
    unread: tuple[str, ...] = ()
    most: int = 10_000
    more: Callable[..., dict[str, Any]] | None = None


def _eva_rows(names):
    rows = towers.rows(towers.EVA, key_bias=False)
    return [row for row in rows if row.name in names or not row.name.startswith(towers.EVA.norm)]


def _qformer_rows(names):
    """Queries and projection only if they are there: a Q-Former may be by itself."""
    apart = (qformer.QUERIES, *(row.name for row in qformer.projection_rows()))
    return [row for row in qformer.rows() if row.name in names or row.name not in apart]


def _projection_rows(names):
    return qformer.projection_rows(hidden=f"{qformer.PROJECTION}.0.weight" in names)


def _without_key_biases(path, flat, kept, size):
    """The queries' biases, with which those of keys are looked at: they must be 0, since ours have none."""
    del path
    at = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/bias"
    names = [f"{towers.BLIP2.layer.format(i=i)}.{towers.BLIP2.attention[0]}.bias" for i in range(size["L"])]

    def look(x):
        for name in names:
            if assemble.read_piece(kept[name], 1, 3).any():
                raise CheckpointError(
                    f"{kept[name].path}: {kept[name].name} has biases of keys, which are 0 in BLIP-2's tower, and "
                    "which ours doesn't have"
                )
        return x

    leaf = flat[at]
    return {at: lazy.derive(leaf, leaf.shape, look)}


def _last_norm(path, flat, kept, size):
    """A norm for a tower whose file has none."""
    del kept
    folder = "img/Transformer/encoder_norm"
    if f"{folder}/scale" in flat:
        return {}
    assemble.tell(f"{path} has no ln_vision: the tower's last norm has scale 1 and bias 0, as MiniGPT-v2 creates it")
    return {f"{folder}/scale": np.ones(size["D"], np.float32), f"{folder}/bias": np.zeros(size["D"], np.float32)}


_TRUNK, _PROJECTION = r"trunk\..*", rf"{qformer.PROJECTION}\..*"
_GROUPS = (
    _Group(
        "open_clip's or timm's image tower",
        "img",
        "trunk.blocks.0.attn.qkv.bias",
        _TRUNK,
        lambda names: towers.rows(towers.TIMM),
        (r"trunk\.head\..*",),
    ),
    _Group(
        "EVA's image tower",
        "img",
        "trunk.blocks.0.attn.q_bias",
        rf"{_TRUNK}|ln_vision\..*",
        _eva_rows,
        (r"trunk\.(norm|fc_norm|head|lm_head)\..*", r"trunk\.mask_token", r"trunk\.(.*\.)?rel(ative)?_pos.*"),
        EVA_LAYERS,
        _last_norm,
    ),
    _Group(
        "BLIP-2's image tower",
        "img",
        "vision_model.encoder.layers.0.self_attn.qkv.weight",
        r"vision_model\..*",
        lambda names: towers.rows(towers.BLIP2, key_bias=False),
        more=_without_key_biases,
    ),
    _Group(
        "BLIP-2's query transformer",
        "connector",
        qformer.FIRST,
        rf"qformer\..*|{qformer.QUERIES}|{_PROJECTION}",
        _qformer_rows,
        qformer.TEXT,
    ),
    _Group(
        "Gemma 3's projector",
        "connector",
        "multi_modal_projector.mm_input_projection_weight",
        r"multi_modal_projector\..*",
        lambda names: gemma3.projector_rows(),
    ),
    # In a file with a query transformer this is its last layer, and of the group before.
    *(
        _Group("the projection", "connector", f"{qformer.PROJECTION}{n}.weight", _PROJECTION, _projection_rows)
        for n in ("", ".0")
    ),
)
# What canonical names begin with, by what a file has in place of it.
_RENAMED = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"visual\.trunk\.|visual_encoder\.", "trunk."),
        (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
        (r"Qformer\.bert\.(encoder\.layer\.\d+\.(?:cross)?attention)\.self\.", r"qformer.\1.attention."),
        (r"Qformer\.(?:bert\.)?", "qformer."),
        (r"(?:opt|t5|llm|llama)_proj\.|language_projection\.", f"{qformer.PROJECTION}."),
        (r"(?:base_model\.model\.)?(?:model\.)?mm_projector\.", f"{qformer.PROJECTION}."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    )
)
# A part by itself has its names without what is in front of them in a whole system: (such a name, what is missing).
_ALONE = (
    ("blocks.0.attn.qkv.weight", "trunk."),
    ("encoder.layers.0.self_attn.qkv.weight", "vision_model."),
    ("encoder.layer.0.intermediate_query.dense.weight", "qformer."),
)


def is_one(path: str) -> bool:
    """Whether a folder or file of weights is read here rather than by the family of its config.json."""
    if os.path.isfile(path):
        return True
    at = os.path.join(path, "config.json")
    if os.path.isfile(at):
        kind = config.read_json(at).get("model_type")
        if isinstance(kind, str) and kind in families.FAMILIES:
            return False
    try:
        return bool(_groups_of(_canonical(tensors.open_all(path))))
    except (FileNotFoundError, CheckpointError):
        return False  # whoever reads it says what is wrong


def open_original(path: str) -> dict[str, Any]:
    """Opens the parts in a file, or in a folder of them: our tree of `lazy.Lazy`, read one by one.

    What the file has besides is said on stderr. A tower of EVA's without its norm `ln_vision` gets one that changes
    nothing but the features' mean and size, which is said, too.

    Args:
      path: a file of safetensors, or a folder with some, as for `tensors.open_all`.

    Returns:
      {"img": …} or {"connector": …}, or both. Kernels have heads as one axis unless a config.json says how many there
      are; queries and projection of a query transformer may be missing.

    Raises:
      FileNotFoundError: no weights.
      CheckpointError: a file is damaged, it has no part that is known, or tensors are missing, unexpected or
        mis-shaped.
    """
    found = _canonical(tensors.open_all(path))
    groups = _groups_of(found)
    if not groups:
        raise CheckpointError(
            f"{path} has {len(found)} tensors that are no part known here, such as "
            f"{listed(sorted(t.name for t in found.values())[:2])}: expected {_known()}"
        )
    heads, flat, unread = _heads(path), {}, {*found}
    for group in groups:
        rows = [*group.rows(found)]
        own = {name: t for name, t in found.items() if re.fullmatch(group.own, name)}
        kept = {n: t for n, t in own.items() if not any(re.fullmatch(regex, n) for regex in group.unread)}
        kept, depth = _in_layers(kept, rows, group.most)
        size = _measure(path, group, kept, rows, depth, heads.get(group.part))
        assemble.check(kept, rows, {group.part: size}, f"{path} is not {group.name}")
        for row in rows:
            for i in assemble.layers(row, size):
                _check_float(kept[row.name_in(i)])
        one_axis = group.part not in heads
        flat |= {p: assemble.leaf(some, kept, size, one_axis=one_axis) for p, some in by_path(rows).items()}
        unread -= {*kept}
        if group.more:
            flat |= group.more(path, flat, kept, size)
    assemble.tell_unread(path, (found[name].name for name in unread))
    return unflatten_tree(flat)


def _known():
    return ", ".join(dict.fromkeys(group.name for group in _GROUPS)) + ", or a Hugging Face directory"


def _canonical(found):
    """{canonical name: Tensor}."""
    names = {tensor.name for tensor in found}
    alone = next((prefix for name, prefix in _ALONE if name in names), "")
    out = {}
    for tensor in found:
        name = tensor.name if tensor.name.startswith(f"{towers.EVA.norm}.") else alone + tensor.name
        for old, new in _RENAMED:
            name, changed = old.subn(new, name) if old.match(name) else (name, 0)
            if changed:
                break
        if name in out:
            raise CheckpointError(f"{tensor.path}: {tensor.name} is the same as {out[name].name} in {out[name].path}")
        out[name] = tensor
    return out


def _groups_of(found):
    out = []
    for group in _GROUPS:
        if group.mark in found and group.part not in [g.part for g in out]:
            out.append(group)
    return out


def _check_float(tensor):
    if tensor.dtype is None:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} is no tensor of {', '.join(tensors.TYPES)}; quantised weights are not read"
        )


def _in_layers(kept, rows, most):
    """({name: Tensor} without those of layers past `most`, how many layers of ours there are)."""
    row = next((row for row in rows if row.leaf.stacked), None)
    if row is None:
        return kept, 0
    begin, step = row.name.partition("{i}")[0], row.numbering[1]
    numbers = {n: int(m[1]) for n in kept if (m := re.match(rf"{re.escape(begin)}(\d{{1,4}})\.", n))}
    kept = {n: t for n, t in kept.items() if numbers.get(n, 0) < most}
    return kept, min(max(numbers.values()) // step + 1, most)


def _measure(path, group, kept, rows, depth, heads):
    """{axis letter: length}; N = 1 if the number of heads is unknown."""
    size, missing = {"L": depth}, []
    for row in rows:
        for i in assemble.layers(row, size):
            if row.name_in(i) not in kept:
                missing.append(row.name_in(i))
    if missing:
        raise CheckpointError(
            f"{path} is not {group.name}: {len(missing)} tensors are missing, such as {listed(missing[:3])}"
        )
    for row in rows:
        groups = re.findall(r"\(([^)]*)\)|(\w)", row.theirs)
        axes = [(several or one).split() for several, one in groups]
        tensor = kept[row.name_in(0 if row.leaf.stacked else None)]
        shape = [*tensor.shape]
        if len(axes) != len(shape):
            raise CheckpointError(f"{path}: {tensor.name} has shape {tensor.shape}, expected {len(axes)} axes")
        shape[0] //= row.piece[1]
        for letters, n in zip(axes, shape, strict=True):
            if letters == ["N", "H"]:
                size.setdefault("N", heads or 1)
                size.setdefault("H", n // size["N"])
            elif len(letters) == 1 and not letters[0].isdigit():
                size.setdefault(letters[0], n)
    return size


# What our parts compute without having an argument for it; defaults as transformers 5.24 has them.
_SECTIONS = {
    "blip_2_vision_model": ("img", "vision_config", 16, dict(hidden_act="gelu", layer_norm_eps=1e-6)),
    "blip_2_qformer": (
        "connector",
        "qformer_config",
        12,
        dict(hidden_act="gelu", layer_norm_eps=1e-12, cross_attention_frequency=2),
    ),
}


def _heads(path) -> Mapping[str, int]:
    """{part: number of heads}, of what a config.json of BLIP-2 says them of."""
    at = os.path.join(path, "config.json")
    whole = config.read_json(at) if os.path.isfile(at) else {}
    out = {}
    for kind, (part, key, default, fixed) in _SECTIONS.items():
        if whole.get("model_type") == "blip-2" or whole.get("model_type") == kind:
            key = key if whole["model_type"] == "blip-2" else None
            section = config.section(
                whole,
                key,
                at,
                types=(kind,),
                absent={},
                defaults={kind: dict(num_attention_heads=default)},
                fixed={kind: fixed},
            )
            out[part] = section.number("num_attention_heads")
    return out
