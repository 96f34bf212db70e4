"""A local causal language model of `transformers`: finding it, its weights, its prompts."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any

from paligemma_med import files
from paligemma_med.pp import json_text
from tools.synthesize_qa import units as units_lib

DTYPES = ("bfloat16", "float16", "float32")
QUANTIZE = ("none", "8bit", "4bit")
WEIGHTS = ("*.safetensors",)  # pickled ones are not read: they could run code
# A template that prints today's date would make a different prompt tomorrow.
_TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024", "enable_thinking": False}


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model. name, weights: for provenance. limit: tokens of prompt and reply together."""

    model: Any
    tokenizer: Any
    name: str
    weights: str
    settings: dict
    versions: dict
    limit: int
    system: bool  # whether its chat template knows the role
    prefixes: dict = dataclasses.field(default_factory=dict)


def find(name, download=False) -> tuple[pathlib.Path, str | None]:
    """Where a model is: (folder, name of its GGUF file or None).

    Args:
      name: a folder written by `save_pretrained`, a .gguf file, or a name on Hugging Face's hub (a GGUF
        file in a repository: OWNER/NAME/FILE.gguf), of which only earlier downloads are used.
      download: fetch missing files.

    Raises:
      ValueError: the model wasn't found.
    """
    path, file = pathlib.Path(name).expanduser(), None
    if path.is_dir():
        return path, None
    if path.suffix.lower() == ".gguf":
        if path.is_file():
            return path.parent, path.name
        name, file = name.rpartition("/")[::2]
    import huggingface_hub

    patterns = [file] if file else ["*.json", "*.model", "*.txt", "*.jinja", *WEIGHTS]
    try:
        found = huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=not download)
    except (OSError, ValueError) as e:
        why = " ".join(str(e).split())[:200] if download else "--download fetches it"
        raise ValueError(
            f"--model={name}: no such folder or .gguf file, and no model of that name was "
            f"downloaded before ({why}); expected one of them."
        ) from None
    return pathlib.Path(found), file


def fingerprint(folder, file=None) -> str:
    """SHA-256 of the weights, "sha256:…": of a file, or of its names and digests for several.

    Digests of files are kept in ~/.cache by path, size and time of change: an 8B model is 16 GB.

    Raises:
      ValueError: there are no weights.
    """
    paths = [folder / file] if file else sorted(p for w in WEIGHTS for p in folder.glob(w))
    if not paths:
        pickled = "; pickled weights (.bin) are not read" if any(folder.glob("*.bin")) else ""
        raise ValueError(f"--model: {folder} has no {WEIGHTS[0]}; expected weights there{pickled}.")
    digests = [(p.name, _file_digest(p)) for p in paths]
    if len(digests) > 1:
        return "sha256:" + units_lib.digest(digests)
    return "sha256:" + digests[0][1]


def _file_digest(path):
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = cache / "paligemma_med" / "weights.json"
    stat = path.stat()
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    try:
        known = json_text.read(cache, "digests", root=dict)
        if isinstance(known[key], str):
            return known[key]
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    known = known if isinstance(known, dict) else {}
    with contextlib.suppress(OSError):  # it is only a cache
        files.write_text(cache, json.dumps({**known, key: found}))
    return found


def load(
    name,
    *,
    dtype="bfloat16",
    quantize="none",
    device_map=None,
    download=False,
    threads=None,
    **decoding,
) -> Model:
    """Loads tokenizer and weights.

    Args:
      name, download: as for `find`.
      dtype: of weights and activations, one of DTYPES.
      quantize: one of QUANTIZE; the weights' matrices in 8 or 4 bits, by bitsandbytes.
      device_map: as in transformers ("auto", "cuda:0", "cpu", …); None: "auto" if there is a GPU.
      threads: PyTorch's, on the CPU; None: its own choice. Another number may sum in another order.
      decoding: max_new_tokens, temperature, top_p.

    Returns:
      `Model`.

    Raises:
      ValueError: the model wasn't found, isn't causal or has no chat template; a package that it needs
        isn't installed.
    """
    folder, file = find(name, download)
    torch, transformers = _import_packages()
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    weights = fingerprint(folder, file)
    kw = {"local_files_only": True, **({"gguf_file": file} if file else {})}
    versions = _versions("torch", "transformers")
    if file:
        _need("gguf", f"--model={name}")
        versions |= _versions("gguf")
    more = {}
    if quantize != "none":
        _need("bitsandbytes", f"--quantize={quantize}")
        versions |= _versions("bitsandbytes")
        more["quantization_config"] = _quantization(quantize, dtype)
    if device_map or torch.cuda.is_available():
        _need("accelerate", "device_map")
        more["device_map"] = device_map or "auto"
    if not file:
        more["use_safetensors"] = True
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left", **kw)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **kw, **more)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise ValueError(
            f"--model={name}: can't be loaded ({' '.join(str(e).split())[:300]}); expected a "
            "causal language model that transformers knows."
        ) from None
    if not tokenizer.chat_template:
        raise ValueError(
            f"--model={name} has no chat template; expected an instruct model, such as "
            "meta-llama/Llama-3.1-8B-Instruct."
        )
    model.eval()
    model.generation_config = _generation_config(model, tokenizer, **decoding)
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
    settings = {**decoding, "dtype": dtype, "quantize": quantize, "chat_template": template}
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 40
    return Model(
        model,
        tokenizer,
        name if not pathlib.Path(name).expanduser().exists() else _short(name),
        weights,
        settings,
        versions,
        limit,
        _knows_system(tokenizer),
    )


def _import_packages():
    try:
        import torch
        import transformers
    except ImportError as e:
        raise ValueError(
            f"the transformers backend needs PyTorch and transformers ({e}); install paligemma_med[synthesis]."
        ) from None
    return torch, transformers


def _quantization(quantize, dtype):
    import torch
    import transformers

    bits = {f"load_in_{quantize}": True}
    if quantize == "4bit":
        bits |= {"bnb_4bit_compute_dtype": getattr(torch, dtype), "bnb_4bit_quant_type": "nf4"}
    return transformers.BitsAndBytesConfig(**bits)


def _generation_config(model, tokenizer, *, max_new_tokens, temperature, top_p=None):
    """A new config, so that the model's own settings of sampling don't mix with the user's."""
    import transformers

    eos, pad = _eos(model, tokenizer), tokenizer.pad_token_id
    sampling = {"temperature": temperature, "top_k": 0, "top_p": top_p or 1.0} if temperature else {}
    return transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=bool(temperature),
        **sampling,
        eos_token_id=eos,
        pad_token_id=eos[0] if pad is None else pad,
    )


def _short(name):
    """A path's last part, since provenance shouldn't reveal the user's folders."""
    return pathlib.Path(name).expanduser().resolve().name


def _need(package, what):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"{what} needs the package {package}; pip install {package}.") from None


def _versions(*packages):
    return {p: importlib.metadata.version(p) for p in packages}


def _eos(model, tokenizer):
    """The ids that end a reply: the model's and the tokenizer's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    found = [x for x in dict.fromkeys([*own, tokenizer.eos_token_id]) if x is not None]
    if not found:
        raise ValueError("the model names no token that ends a reply; expected an eos_token.")
    return found


def _knows_system(tokenizer):
    messages = [{"role": "system", "content": "sys0tem"}, {"role": "user", "content": "us0er"}]
    try:
        return "sys0tem" in tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # templates raise anything
        return False


# --- Prompts ---


def prompt(model, messages) -> list[int]:
    """The prompt of chat messages as token ids."""
    if not model.system:
        first, second, *rest = messages
        joined = f"{first['content']}\n\n{second['content']}"
        messages = [{"role": "user", "content": joined}, *rest]
    messages = [{**m, "content": _disarm(m["content"], model.tokenizer)} for m in messages]
    text = model.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **_TEMPLATE_ARGUMENTS
    )
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def _disarm(text, tokenizer):
    """The text without control tokens: data that contains one must not end its turn."""
    for token in _control_tokens(tokenizer):
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _control_tokens(tokenizer):
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
