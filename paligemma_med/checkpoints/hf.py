"""Hugging Face PaliGemma weights: their names and layouts, reading and writing, without PyTorch.

One table says which of their tensors makes which of our parameters. Names in it are canonical,
that is, without what the generations of transformers differ in; see `canonical`. transformers'
own table of PaliGemma is models/paligemma/convert_paligemma_weights_to_hf.py.

Axis letters: L layers, P and Q height and width of a patch, C colours, T image tokens, D width of a
tower, E width of the language model (where an image enters it), N query heads, K key/value heads,
H width of a head, F width of an MLP, V vocabulary. In a layout, axes in brackets are one axis.
"""

import functools
import itertools
import json
import math
import os
import re
import struct
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (numpy knows "bfloat16" once it is imported, and safetensors needs that)
import numpy as np
import safetensors

from paligemma_med import files
from paligemma_med.checkpoints import fit, lazy
from paligemma_med.checkpoints.errors import CheckpointError, listed, raise_all
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

# --- the table ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """One kind of tensor.

    Attributes:
      name: its canonical name; "{i}" stands for the layer.
      theirs: its layout.
      param: path of our parameter, which has the layers (L) in front where the name has "{i}".
      ours: layout of the part of it that is this tensor, in one layer.
      index: place of that part on the axis after that of layers; None if there is but one.
    """

    name: str
    theirs: str
    param: str
    ours: str
    index: int | None = None

    @property
    def stacked(self):
        return "{i}" in self.name


@functools.cache
def table(*, mha, post_norms):
    """All rows of a model: tuple of Row.

    Args:
      mha: every query head has keys of its own (big_vision then has one `qkv_einsum`).
      post_norms: Gemma 2's norms after each sublayer.
    """
    return tuple(_rows(mha, post_norms))


def _rows(mha, post_norms):
    tower, block = "vision_tower", "img/Transformer/encoderblock"
    at = f"{tower}.embeddings"
    yield Row(f"{at}.patch_embedding.weight", "D C P Q", "img/embedding/kernel", "P Q C D")
    yield Row(f"{at}.patch_embedding.bias", "D", "img/embedding/bias", "D")
    # One position table, whose leading axis of 1 is no axis of theirs: a part like k and v.
    yield Row(f"{at}.position_embedding.weight", "T D", "img/pos_embedding", "T D", 0)
    at, attn = f"{tower}.encoder.layers.{{i}}", f"{block}/MultiHeadDotProductAttention_0"
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        name = f"{at}.self_attn.{theirs}"
        yield Row(f"{name}.weight", "(N H) D", f"{attn}/{ours}/kernel", "D N H")
        yield Row(f"{name}.bias", "(N H)", f"{attn}/{ours}/bias", "N H")
    yield Row(f"{at}.self_attn.out_proj.weight", "D (N H)", f"{attn}/out/kernel", "N H D")
    yield Row(f"{at}.self_attn.out_proj.bias", "D", f"{attn}/out/bias", "D")
    for theirs, ours, layout in (("fc1", "Dense_0", "D F"), ("fc2", "Dense_1", "F D")):
        out = layout[-1]
        mlp = f"{block}/MlpBlock_0/{ours}"
        yield Row(f"{at}.mlp.{theirs}.weight", layout[::-1], f"{mlp}/kernel", layout)
        yield Row(f"{at}.mlp.{theirs}.bias", out, f"{mlp}/bias", out)
    for theirs, ours in (
        (f"{at}.layer_norm1", f"{block}/LayerNorm_0"),
        (f"{at}.layer_norm2", f"{block}/LayerNorm_1"),
        (f"{tower}.post_layernorm", "img/Transformer/encoder_norm"),
    ):
        yield Row(f"{theirs}.weight", "D", f"{ours}/scale", "D")
        yield Row(f"{theirs}.bias", "D", f"{ours}/bias", "D")
    yield Row("multi_modal_projector.linear.weight", "E D", "img/head/kernel", "D E")
    yield Row("multi_modal_projector.linear.bias", "E", "img/head/bias", "E")

    decoder = "language_model"
    yield Row(f"{decoder}.embed_tokens.weight", "V D", "llm/embedder/input_embedding", "V D")
    at, attn, mlp = f"{decoder}.layers.{{i}}", "llm/layers/attn", "llm/layers/mlp"
    q, k, v, o = (f"{at}.self_attn.{c}_proj.weight" for c in "qkvo")
    if mha:
        for i, name in enumerate((q, k, v)):
            yield Row(name, "(N H) D", f"{attn}/qkv_einsum/w", "N D H", i)
    else:
        yield Row(q, "(N H) D", f"{attn}/q_einsum/w", "N D H")
        yield Row(k, "(K H) D", f"{attn}/kv_einsum/w", "K D H", 0)
        yield Row(v, "(K H) D", f"{attn}/kv_einsum/w", "K D H", 1)
    yield Row(o, "D (N H)", f"{attn}/attn_vec_einsum/w", "N H D")
    for i, name in enumerate(("gate", "up")):
        yield Row(f"{at}.mlp.{name}_proj.weight", "F D", f"{mlp}/gating_einsum", "D F", i)
    yield Row(f"{at}.mlp.down_proj.weight", "D F", f"{mlp}/linear", "F D")
    norms = ["input_layernorm", "post_attention_layernorm"]
    names = ["pre_attention_norm", "pre_ffw_norm"]
    if post_norms:  # Gemma 1's second norm bears the name of another in Gemma 2
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        names = ["pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"]
    for theirs, ours in zip(norms, names, strict=True):
        yield Row(f"{at}.{theirs}.weight", "D", f"llm/layers/{ours}/scale", "D")
    yield Row(f"{decoder}.norm.weight", "D", "llm/final_norm/scale", "D")


def canonical(name):
    """A tensor's or module's name without what the generations of transformers differ in.

    "model.language_model.layers.0…" (since 4.52), "language_model.model.layers.0…" (before, and on
    Google's pages) → "language_model.layers.0…"; "…vision_tower.vision_model.encoder…" (before 5)
    → "vision_tower.encoder…"; "language_model.lm_head…" → "lm_head…".
    """
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def module_of(target):
    """Canonical name of the module that a `lora_targets.Target` adapts; "{i}" stands for the layer."""
    for row in (*table(mha=False, post_norms=False), *table(mha=True, post_norms=False)):
        if (row.param, row.index) == (target.param, target.index):
            return row.name.removesuffix(".weight")
    raise KeyError(f"{target.name} is not in the table")


def _axes(layout):
    """ "(N H) D" → [["N", "H"], ["D"]]."""
    return [re.findall(r"\w", group) for group in re.findall(r"\([^)]*\)|\w", layout)]


def _shape(layout, size):
    return tuple(math.prod(size[c] for c in group) for group in _axes(layout))


def relayout(x, old, new, size):
    """Array in layout `old` → the same in layout `new`; a view where numpy can.

    Args:
      size: {axis letter: length}.
    """
    before, after = (list(itertools.chain(*_axes(layout))) for layout in (old, new))
    x = x.reshape([size[c] for c in before]).transpose([before.index(c) for c in after])
    return x.reshape(_shape(new, size))


def _by_param(rows):
    """{our parameter: its rows in the order of their index}."""
    out = {}
    for row in rows:
        out.setdefault(row.param, []).append(row)
    return out


# --- config.json -------------------------------------------------------------------------------

_TANH = "gelu_pytorch_tanh"

# Keys that a config.json leaves out have their class's default; those of transformers 5.23,
# models/{siglip,gemma,gemma2}/configuration_*.py. Google's own files leave out head_dim, for one.
_DEFAULTS = {
    "siglip_vision_model": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_channels=3,
        image_size=224,
        patch_size=16,
    ),
    "gemma": dict(
        hidden_size=3072,
        intermediate_size=24_576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        vocab_size=256_000,
    ),
    "gemma2": dict(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256_000,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
}
# Where a whole section is missing, PaliGemmaConfig has defaults of its own
# (models/paligemma/configuration_paligemma.py).
_SECTIONS = {
    "vision_config": dict(
        model_type="siglip_vision_model",
        hidden_size=1152,
        intermediate_size=4096,
        num_hidden_layers=27,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
    ),
    "text_config": dict(
        model_type="gemma",
        hidden_size=2048,
        intermediate_size=16_384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        vocab_size=257_152,
    ),
}
_IMAGE_TOKEN = 256_000
# What our model computes and has no argument for.
_FIXED = {
    "siglip_vision_model": dict(hidden_act=_TANH, layer_norm_eps=1e-6),
    "gemma": dict(
        hidden_act=_TANH,
        rms_norm_eps=1e-6,
        attention_bias=False,
        rope_theta=1e4,
        rope_type="default",
        rope_scaling=None,
    ),
    "gemma2": dict(
        hidden_activation=_TANH,
        rms_norm_eps=1e-6,
        attention_bias=False,
        rope_theta=1e4,
        rope_type="default",
        rope_scaling=None,
    ),
}


class _Config(NamedTuple):
    """What config.json says of the model: our two dicts, their sizes by letter, token table."""

    img: dict
    llm: dict
    size: dict
    rows: tuple
    table_rows: int  # of the embedding in the files; ours has llm["vocab_size"]


def model_config(folder):
    """The model of a Hugging Face PaliGemma directory, from its config.json.

    Returns:
      (img, llm): `paligemma.Model(img=img, llm=llm)` is that model, every size given.

    Raises:
      FileNotFoundError: no config.json.
      CheckpointError: it is not PaliGemma's, or asks for what our model doesn't compute.
    """
    config = _read_config(folder)
    return config.img, config.llm


def _read_config(folder):
    path = os.path.join(folder, "config.json")
    whole = _read_json(path)
    if whole.get("model_type") != "paligemma":
        raise CheckpointError(f"{path} has model_type {whole.get('model_type')!r}: expected 'paligemma'")
    vision = _section(whole, "vision_config", ("siglip_vision_model",), path)
    text = _section(whole, "text_config", ("gemma", "gemma2"), path)

    def number(section, key):
        n = section[key]
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise CheckpointError(f"{path}: {key} is {n!r}, expected a whole number above 0")
        return n

    width, heads, patch, side = (
        number(vision, k) for k in ("hidden_size", "num_attention_heads", "patch_size", "image_size")
    )
    if width % heads or side % patch:
        raise CheckpointError(
            f"{path}: {heads} heads must divide the tower's width of {width}, and patches of "
            f"{patch} px images of {side} px"
        )
    img = dict(
        variant=None,
        width=width,
        depth=number(vision, "num_hidden_layers"),
        mlp_dim=number(vision, "intermediate_size"),
        num_heads=heads,
        patch_size=patch,
    )
    rows = number(text, "vocab_size")
    llm = dict(
        variant=None,
        width=number(text, "hidden_size"),
        depth=number(text, "num_hidden_layers"),
        mlp_dim=number(text, "intermediate_size"),
        num_heads=number(text, "num_attention_heads"),
        num_kv_heads=number(text, "num_key_value_heads"),
        head_dim=number(text, "head_dim"),
        vocab_size=_our_rows(whole, rows, path),
    )
    post_norms = text["model_type"] == "gemma2"
    if post_norms:
        llm |= dict(
            post_norms=True,
            attn_logits_softcap=text["attn_logit_softcapping"],
            final_logits_softcap=text["final_logit_softcapping"],
            query_pre_attn_norm=_query_norm(text, llm, path),
        )
    size = {
        "img": dict(
            P=patch,
            Q=patch,
            C=number(vision, "num_channels"),
            T=(side // patch) ** 2,
            D=width,
            N=heads,
            H=width // heads,
            F=img["mlp_dim"],
            E=llm["width"],
            L=img["depth"],
        ),
        "llm": dict(
            V=rows,
            D=llm["width"],
            N=llm["num_heads"],
            K=llm["num_kv_heads"],
            H=llm["head_dim"],
            F=llm["mlp_dim"],
            L=llm["depth"],
        ),
    }
    mha = llm["num_heads"] == llm["num_kv_heads"]
    return _Config(img, llm, size, table(mha=mha, post_norms=post_norms), rows)


def _section(whole, key, types, path):
    section = whole.get(key)
    if section is None:
        section = _SECTIONS[key]
    if not isinstance(section, dict):
        raise CheckpointError(f"{path}: {key} is {section!r}, expected an object")
    kind = section.get("model_type") or types[0]
    if kind not in types:
        raise CheckpointError(f"{path}: {key} has model_type {kind!r}, expected {' or '.join(types)}")
    rope = section.get("rope_parameters")
    section = {**section, **(rope if isinstance(rope, dict) else {})}
    for name, value in _FIXED[kind].items():
        if section.get(name, value) != value:
            raise CheckpointError(f"{path}: {key}.{name} is {section[name]!r}, but this model has {value!r}")
    return {**_DEFAULTS[kind], **section, "model_type": kind}


def _our_rows(whole, rows, path):
    """Rows of our table: theirs has some more, from the image's token on, that mean nothing."""
    token = whole.get("image_token_index", whole.get("image_token_id", _IMAGE_TOKEN))
    if isinstance(token, bool) or not isinstance(token, int) or token < 1:
        raise CheckpointError(f"{path}: image_token_index is {token!r}, expected a token's number")
    if rows - token > PADDING:
        raise CheckpointError(
            f"{path}: the embedding has {rows} rows, {rows - token} from image_token_index {token} "
            f"on, expected at most {PADDING}, which are padding"
        )
    return min(rows, token)


def _query_norm(text, llm, path):
    scalar = text["query_pre_attn_scalar"]
    for name, n in (
        ("rsqrt_head_dim", llm["head_dim"]),
        ("rsqrt_emb_per_head", llm["width"] // llm["num_heads"]),
    ):
        if scalar == n:
            return name
    raise CheckpointError(
        f"{path}: query_pre_attn_scalar is {scalar!r}, expected head_dim ({llm['head_dim']}) or "
        f"hidden_size / num_attention_heads ({llm['width'] // llm['num_heads']})"
    )


def _read_json(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: expected a Hugging Face directory")
    try:
        with open(path, encoding="utf-8") as f:
            out = json.load(f)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from None
    if not isinstance(out, dict):
        raise CheckpointError(f"{path} holds a {type(out).__name__}, expected an object")
    return out


# --- reading -----------------------------------------------------------------------------------

_EMBEDDING, _HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Tables that some versions of transformers saved and that hold nothing learnt.
_BUFFERS = (
    r"vision_tower\.embeddings\.position_ids",
    r"language_model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
_PIECE = 2**24  # bytes of the two tables that are compared at once


class _Tensor(NamedTuple):
    """A tensor in a safetensors file."""

    path: str
    name: str
    shape: tuple
    dtype: np.dtype

    def read(self, start=0, stop=None):
        """Its rows from start to stop as a numpy array."""
        # Opened anew each time: what an open file has read counts as this process's memory.
        try:
            with safetensors.safe_open(self.path, "np") as f:
                if (start, stop) == (0, None):
                    return f.get_tensor(self.name)
                return f.get_slice(self.name)[start:stop]
        except (safetensors.SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.path}: {self.name} can't be read: {e}") from e


def open_hf(folder):
    """Opens a Hugging Face PaliGemma directory: our tree of `lazy.Lazy`, read one by one.

    The embedding's rows from the image's token on are left out, and its tied copy `lm_head` must
    equal it to the bit, which is checked when it is read.

    Args:
      folder: with config.json and *.safetensors, in one file or several with an index, under the
        names of any version of transformers.

    Returns:
      {"img": …, "llm": …}; dtypes as stored (layers of unlike types become float32).

    Raises:
      FileNotFoundError: no config.json or weights.
      CheckpointError: a file is damaged, or tensors are missing, unexpected or mis-shaped.
    """
    folder = os.fspath(folder)
    config = _read_config(folder)
    tensors = _open_tensors(folder)
    head = tensors.pop(_HEAD, None)
    if head and head.shape != tensors.setdefault(_EMBEDDING, head).shape:
        raise CheckpointError(
            f"{head.path}: {head.name} has shape {head.shape}, the embedding that it is tied to "
            f"{tensors[_EMBEDDING].shape}"
        )
    _check(tensors, config, folder)

    flat = {}
    for param, rows in _by_param(config.rows).items():
        size = config.size[param[:3]]
        # Where in our array each of their tensors goes.
        parts = []
        for row in rows:
            part = () if row.index is None else (row.index,)
            for i in range(size["L"]) if row.stacked else (None,):
                at = part if i is None else (i, *part)
                parts.append((at, tensors[row.name.format(i=i)], row))
        layers = (size["L"],) if rows[0].stacked else ()
        several = () if rows[0].index is None else (len(rows),)
        shape = (*layers, *several, *_shape(rows[0].ours, size))
        dtype = _common(tensor.dtype for _, tensor, _ in parts)
        flat[param] = Lazy(shape, dtype, functools.partial(_fill, shape, dtype, parts, size))
    embedding = tensors[_EMBEDDING]
    shape = (config.llm["vocab_size"], config.llm["width"])
    flat["llm/embedder/input_embedding"] = Lazy(
        shape, embedding.dtype, functools.partial(_read_embedding, embedding, head, shape[0])
    )
    return unflatten_tree(flat)


def _common(dtypes):
    dtypes = set(dtypes)
    return dtypes.pop() if len(dtypes) == 1 else np.dtype("float32")


def _fill(shape, dtype, parts, size):
    out = np.empty(shape, dtype)
    for at, tensor, row in parts:
        out[at] = relayout(tensor.read(), row.theirs, row.ours, size)
    return out


def _read_embedding(embedding, head, rows):
    if head and head != embedding:
        step = max(1, _PIECE // max(1, embedding.shape[1] * embedding.dtype.itemsize))
        for start in range(0, embedding.shape[0], step):
            stop = min(start + step, embedding.shape[0])
            a, b = (t.read(start, stop) for t in (embedding, head))
            if a.tobytes() != b.tobytes():
                raise CheckpointError(
                    f"{head.path}: {head.name} differs from {embedding.name} within rows {start} "
                    f"to {stop}: this model's output is tied to its embedding"
                )
    return embedding.read(0, rows)


def _check(tensors, config, folder):
    """One error for everything that is missing, unexpected or of another shape."""
    if (most := max(config.size[k]["L"] for k in ("img", "llm"))) > len(tensors):
        raise CheckpointError(f"{folder} has {len(tensors)} tensors for {most} layers")
    expected = {}
    for row in config.rows:
        size = config.size[row.param[:3]]
        for i in range(size["L"]) if row.stacked else (None,):
            expected[row.name.format(i=i)] = _shape(row.theirs, size)
    problems = []
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name}: missing, expected {shape}")
        elif tensors[name].shape != shape:
            problems.append(f"{name}: expected {shape}, found {tensors[name].shape}")
    for name in sorted(tensors.keys() - expected.keys()):
        problems.append(f"{name}: unexpected, found {tensors[name].shape}")
    raise_all(problems, f"{folder} doesn't fit its config.json", len(expected))


def _open_tensors(folder):
    """{canonical name: _Tensor} of all files, without known buffers."""
    names_of_files, indexed = _files(folder)
    out, names = {}, set()
    for file in names_of_files:
        path = os.path.join(folder, file)
        for tensor in _open_file(path):
            names.add(tensor.name)
            name = canonical(tensor.name)
            if any(re.fullmatch(b, name) for b in _BUFFERS):
                continue
            if name in out:
                raise CheckpointError(f"{path}: {tensor.name} is the same as {out[name].name} in {out[name].path}")
            if tensor.dtype is None:
                raise CheckpointError(
                    f"{path}: {tensor.name} is no tensor of {', '.join(_TYPES)}; quantised weights are not read"
                )
            out[name] = tensor
    if indexed is not None and indexed != names:
        wrong = sorted(indexed ^ names)
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors are either in the index or in the files, not in both: {listed(wrong)}"
        )
    return out


def _open_file(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing")
    out = []
    try:
        with safetensors.safe_open(path, "np") as f:
            for name in f.keys():  # noqa: SIM118 (f is no mapping)
                tensor = f.get_slice(name)
                kind = _TYPES.get(tensor.get_dtype())
                dtype = kind and lazy.dtype_of(kind)
                out.append(_Tensor(path, name, tuple(tensor.get_shape()), dtype))
    except (safetensors.SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path} ({os.path.getsize(path):,} bytes) is not a readable safetensors file; it may "
            f"be cut short or something else (safetensors says: {e})"
        ) from e
    return out


def _files(folder):
    """(file names, the tensors that the index lists or None)."""
    single = os.path.join(folder, _SINGLE)
    index = os.path.join(folder, _INDEX)
    if os.path.isfile(single) or not os.path.isfile(index):
        names = sorted(n for n in os.listdir(folder) if n.endswith(".safetensors"))
        names = [_SINGLE] if _SINGLE in names else names
        if len(names) != 1:
            found = f"{listed(names)} without {_INDEX}" if names else "none"
            raise FileNotFoundError(f"{folder} has no weights: expected {_SINGLE}, found {found}")
        return names, None
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no weight_map")
    for name, file in where.items():
        # A plain name: an index can't reach out of its folder.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise CheckpointError(f"{index}: {name} is in {file!r}, expected a .safetensors file of this folder")
    return sorted(set(where.values())), set(where)


# --- writing -----------------------------------------------------------------------------------

PADDING = 64  # rows after ours, as Google's files have them: the image's token is the first
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class _Planned(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: np.dtype
    shape: tuple
    row: Row
    at: tuple  # its place in our array

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def save_hf(
    folder,
    params,
    *,
    img=None,
    llm=None,
    dtype=None,
    max_shard_bytes=2 * 2**30,
    overwrite=False,
    progress=None,
):
    """Writes a directory that `PaliGemmaForConditionalGeneration.from_pretrained` loads.

    Names are those of Google's pages, which every version of transformers reads: 4.51.3, 4.53.3,
    4.57.1, 5.0.0, 5.8.0 and 5.23.0 were tried. (All between the first and the last of them leave
    out Gemma 2's soft-cap of the output, which changes logits but no greedy answer.) Leaves pass
    through memory one at a time, and the folder appears whole or not at all. The tokenizer and the
    image processor are not part of it: they are those of google/paligemma-*.

    The embedding gets 64 more rows, of which the first is the image's token. They are copies of row
    0 (<pad>), whose logit is therefore theirs too: at a tie argmax takes the lower token, so none
    of them is ever the greedy answer, as rows of zeros would be where all logits are below 0.

    Args:
      folder: where to.
      params: {"img": …, "llm": …} of arrays or `lazy.Lazy`, without adapters.
      img, llm: the model's two config dicts, which say what shapes don't: soft-caps and the scale
        of queries. Without `llm`, Gemma 2 must have the sizes of a known variant.
      dtype: what tensors are cast to; None keeps each as it is.
      max_shard_bytes: tensors go to several files of at most so much.
      overwrite: replace an existing directory of this kind.
      progress: called with the number of bytes (of `params`, before the cast) just written.

    Raises:
      FileExistsError: `folder` exists.
      CheckpointError: the tree is not PaliGemma's, or `img` or `llm` contradict it.
    """
    folder = os.fspath(folder)
    dtype = lazy.dtype_of(dtype)
    flat = {
        key: leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for key, leaf in flatten_tree(fit.stack_layers(params)).items()
    }
    rows = _rows_of(flat)
    size = _measure(flat, rows)
    plan = _plan(flat, rows, size, dtype)
    config = _config_json(size, img, llm, rows, {t.dtype for t in plan})
    shards = _shards(plan, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [_SINGLE]
    with files.whole_folder(folder, replaces=(_SINGLE, _INDEX) if overwrite else None) as new:
        _write_json(os.path.join(new, "config.json"), config)
        tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(os.path.join(new, "generation_config.json"), tokens)
        if len(shards) > 1:
            total = sum(t.nbytes for t in plan)
            where = {t.name: name for name, shard in zip(names, shards) for t in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            _write_json(os.path.join(new, _INDEX), index)
        leaf, param = None, None
        for name, shard in zip(names, shards):
            with open(os.path.join(new, name), "wb") as f:
                f.write(_header(shard))
                for tensor in shard:
                    if tensor.row.param != param:
                        leaf = None  # first let go of the one before
                        leaf, param = np.asarray(flat[tensor.row.param]), tensor.row.param
                    _write_tensor(f, tensor, leaf[tensor.at], size)
                    if progress:
                        progress(leaf[tensor.at].nbytes)


def _rows_of(flat):
    """The table that fits a tree; a tree that none fits is an error."""
    factors = [key for key in flat if key.rpartition("/")[2] in ("lora_a", "lora_b")]
    if factors:
        raise CheckpointError(
            f"the weights have adapters ({factors[0]} and {len(factors) - 1} more), which a "
            "Hugging Face model has no place for: merge them (--merge), or write them (--to peft)"
        )
    rows = table(
        mha="llm/layers/attn/qkv_einsum/w" in flat,
        post_norms="llm/layers/post_attention_norm/scale" in flat,
    )
    expected = {row.param for row in rows}
    problems = [f"{p}: missing" for p in sorted(expected - flat.keys())]
    problems += [f"{p}: unexpected, found {np.shape(flat[p])}" for p in sorted(flat.keys() - expected)]
    problems += [
        f"{p}: has dtype {flat[p].dtype}, expected a floating type"
        for p in sorted(expected & flat.keys())
        if not lazy.is_float(np.dtype(flat[p].dtype))
    ]
    raise_all(problems, "the weights are not PaliGemma's", len(expected))
    return rows


def _measure(flat, rows):
    """{"img": {letter: length}, "llm": …} from the shapes of our parameters."""
    size = {"img": {}, "llm": {}}
    for param, group in _by_param(rows).items():
        shape, row = tuple(np.shape(flat[param])), group[0]
        letters = row.ours.split()
        if row.index is not None:
            letters = [str(len(group)), *letters]
        if row.stacked:
            letters = ["L", *letters]
        own = size[param[:3]]
        # A letter stays where any length will do.
        want = [int(c) if c.isdigit() else own.get(c, c) for c in letters]
        if len(shape) != len(want) or any(w not in (n, c) for w, n, c in zip(want, shape, letters)):
            raise CheckpointError(f"{param}: found shape {shape}, expected ({', '.join(map(str, want))})")
        own.update((c, n) for c, n in zip(letters, shape) if not c.isdigit())
    img, llm = size["img"], size["llm"]
    llm.setdefault("K", llm["N"])
    side = math.isqrt(img["T"])
    if img["E"] != llm["D"] or img["P"] != img["Q"] or side**2 != img["T"]:
        raise CheckpointError(
            f"expected an image tower that leads into the language model's width, with square "
            f"patches on a square grid: found widths {img['E']} and {llm['D']}, patches of "
            f"{img['P']}×{img['Q']} px, {img['T']} positions"
        )
    return size


def _plan(flat, rows, size, dtype):
    """All tensors in the order they are written: our parameters one after the other."""
    out = []
    for param, group in sorted(_by_param(rows).items()):
        own = size[param[:3]]
        kind = dtype or np.dtype(flat[param].dtype)
        for i in range(own["L"]) if group[0].stacked else (None,):
            for row in group:
                shape = _shape(row.theirs, own)
                if row.name == _EMBEDDING:
                    shape = (shape[0] + PADDING, *shape[1:])
                at = tuple(n for n in (i, row.index) if n is not None)
                out.append(_Planned(_hub_name(row.name.format(i=i)), kind, shape, row, at))
    return out


def _hub_name(name):
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def _shards(plan, most):
    out, used = [[]], 0
    for tensor in plan:
        if out[-1] and used + tensor.nbytes > most:
            out.append([])
            used = 0
        out[-1].append(tensor)
        used += tensor.nbytes
    return out


def _header(shard):
    """The beginning of a safetensors file: length, then JSON padded to whole words."""
    names = {lazy.dtype_of(v): k for k, v in _TYPES.items()}
    # transformers before 5 refuses a file that doesn't say what wrote it.
    out, start = {"__metadata__": {"format": "pt"}}, 0
    for t in shard:
        offsets = [start, start := start + t.nbytes]
        out[t.name] = {"dtype": names[t.dtype], "shape": t.shape, "data_offsets": offsets}
    text = json.dumps(out, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(f, tensor, x, size):
    own = size[tensor.row.param[:3]]
    x = relayout(x, tensor.row.ours, tensor.row.theirs, own)
    pieces = [x]
    if tensor.row.name == _EMBEDDING:
        pieces.append(np.broadcast_to(x[:1], (PADDING, x.shape[1])))
    for piece in pieces:
        out = np.asarray(piece.astype(tensor.dtype, copy=False), order="C")
        f.write(out.reshape(-1).view(np.uint8).data)


def _config_json(size, img, llm, rows, dtypes):
    image, text = size["img"], size["llm"]
    post_norms = any(row.param.endswith("post_attention_norm/scale") for row in rows)
    ours_img = dict(
        width=image["D"],
        depth=image["L"],
        mlp_dim=image["F"],
        num_heads=image["N"],
        patch_size=image["P"],
    )
    ours = dict(
        width=text["D"],
        depth=text["L"],
        mlp_dim=text["F"],
        num_heads=text["N"],
        num_kv_heads=text["K"],
        head_dim=text["H"],
        vocab_size=text["V"],
        post_norms=post_norms,
    )
    unseen = _unseen(ours_img, ours, img, llm)
    kind = "gemma2" if post_norms else "gemma"
    text_config = dict(
        model_type=kind,
        hidden_size=text["D"],
        intermediate_size=text["F"],
        num_hidden_layers=text["L"],
        num_attention_heads=text["N"],
        num_key_value_heads=text["K"],
        head_dim=text["H"],
        vocab_size=text["V"] + PADDING,
        num_image_tokens=image["T"],
        hidden_act=_TANH,
        hidden_activation=_TANH,
        tie_word_embeddings=True,
        **unseen,
    )
    vision_config = dict(
        model_type="siglip_vision_model",
        hidden_size=image["D"],
        intermediate_size=image["F"],
        num_hidden_layers=image["L"],
        num_attention_heads=image["N"],
        num_channels=image["C"],
        patch_size=image["P"],
        image_size=math.isqrt(image["T"]) * image["P"],
        num_image_tokens=image["T"],
        projection_dim=image["E"],
        vision_use_head=False,
    )
    return dict(
        architectures=["PaliGemmaForConditionalGeneration"],
        model_type="paligemma",
        torch_dtype=str(_widest(dtypes)),
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        hidden_size=text["D"],
        projection_dim=image["E"],
        image_token_index=text["V"],
        tie_word_embeddings=True,
        text_config=text_config,
        vision_config=vision_config,
    )


def _widest(dtypes):
    """transformers loads all tensors as one type; that in which none loses a bit."""
    widest = max(dtypes, key=lambda d: d.itemsize)
    return np.dtype("float32") if len(dtypes) > 1 and widest.itemsize == 2 else widest


def _unseen(img_sizes, sizes, img, llm):
    """What of text_config isn't in the shapes, from the model's dicts or a known variant."""
    from paligemma_med.models import (
        decoder,
        vit,  # here: they bring JAX, which reading doesn't need
    )

    if img is not None:
        img = {"variant": "So400m/14", **img}
        given = {**(vit.decode_variant(img["variant"]) if img["variant"] else {}), **img}
        if isinstance(given.get("patch_size"), int):
            given["patch_size"] = (given["patch_size"],) * 2
        _agree("img", given, {**img_sizes, "patch_size": (img_sizes["patch_size"],) * 2})
    if llm is None:
        if not sizes["post_norms"]:
            return {}
        for variant in decoder.VARIANTS.values():
            if all(sizes[k] == v for k, v in variant.items() if k in sizes and k != "vocab_size"):
                llm = {"variant": None, **variant}
                break
        else:
            raise CheckpointError(
                f"the language model is a Gemma 2 of sizes {sizes}, which is no known variant, and "
                "its soft-caps are not among the weights: say them with llm=dict(…)"
            )
    llm = {"variant": "gemma_2b", **llm}
    if llm["variant"] and llm["variant"] not in decoder.VARIANTS:
        raise CheckpointError(f"llm variant {llm['variant']!r} is unknown")
    given = {**decoder.VARIANTS.get(llm["variant"], {}), **llm}
    given = {"query_pre_attn_norm": "rsqrt_head_dim", "post_norms": False, **given}
    _agree("llm", given, sizes)
    caps = [given.get(k) for k in ("attn_logits_softcap", "final_logits_softcap")]
    per_head = given["query_pre_attn_norm"] == "rsqrt_emb_per_head"
    scalar = sizes["width"] // sizes["num_heads"] if per_head else sizes["head_dim"]
    if sizes["post_norms"]:
        return dict(
            attn_logit_softcapping=caps[0],
            final_logit_softcapping=caps[1],
            query_pre_attn_scalar=scalar,
        )
    if any(caps) or scalar != sizes["head_dim"]:
        raise CheckpointError(
            "llm has soft-caps or a scale of queries, but no norms after sublayers: transformers' "
            "Gemma has none of them, its Gemma 2 all"
        )
    return {}


def _agree(part, given, sizes):
    for key, n in sizes.items():
        value = given.get(key, n)
        value = tuple(value) if isinstance(value, list) else value
        if value != n:
            raise CheckpointError(f"{part} says {key}={value!r}, but the weights have {n!r}")


def _write_json(path, content):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2, sort_keys=True)
        f.write("\n")
