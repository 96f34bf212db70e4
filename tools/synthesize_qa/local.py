"""The `transformers` backend: a causal language model in PyTorch answers units in batches.

Batches are planned from the list of all units, whatever is answered already, so that a run that was
killed and goes on makes the same batches, and with them the same replies. What all prompts of a
template have in common, its rules and examples, goes through the model once.
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from typing import Any

from paligemma_med import files
from tools.synthesize_qa import units as units_lib

WINDOW = 32  # batches whose units are sorted by length together
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZE = ("none", "8bit", "4bit")
WEIGHTS = ("*.safetensors",)  # pickled ones are not read: they could run code
# Templates that print today's date would make another prompt tomorrow.
_TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024", "enable_thinking": False}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is loaded. name, weights: for provenance. limit: tokens of prompt and reply."""

    model: Any
    tokenizer: Any
    name: str
    weights: str
    settings: dict
    versions: dict
    limit: int
    system: bool  # whether its chat template knows the role
    prefixes: dict = dataclasses.field(default_factory=dict)


# --- Loading ---


def find(name, download=False):
    """Where a model is: (folder, name of its GGUF file or None).

    Args:
      name: a folder as `save_pretrained` writes it, a .gguf file, or a name on Hugging Face's hub
        (a GGUF file in a repository: OWNER/NAME/FILE.gguf), of which only what was downloaded
        before is used.
      download: fetch what isn't there.

    Raises:
      ValueError: it isn't there.
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


def fingerprint(folder, file=None):
    """SHA-256 of the weights, "sha256:…": of a file, or of its names and digests for several.

    Digests of files are kept in ~/.cache by path, size and time of change: an 8B model is 16 GB.

    Raises:
      ValueError: no weights there.
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
        known = json.loads(cache.read_text("utf-8"))
        if isinstance(known[key], str):
            return known[key]
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    known = known if isinstance(known, dict) else {}
    with contextlib.suppress(OSError):  # a cache, no more
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
):
    """Loads tokenizer and weights.

    Args:
      name, download: as of `find`.
      dtype: of weights and activations, one of DTYPES.
      quantize: one of QUANTIZE; the weights' matrices in 8 or 4 bits, by bitsandbytes.
      device_map: as transformers has it ("auto", "cuda:0", "cpu", …); None: "auto" where there is a
        GPU.
      threads: of PyTorch on the CPU; None: its own choice. Another number may sum in another order.
      decoding: max_new_tokens, temperature, top_p.

    Returns:
      `Model`.

    Raises:
      ValueError: the model isn't there, is of no causal kind, has no chat template; a package that
        it needs isn't installed.
    """
    folder, file = find(name, download)
    try:
        import torch
        import transformers
    except ImportError as e:
        raise ValueError(
            f"the transformers backend needs PyTorch and transformers ({e}); install paligemma_med[synthesis]."
        ) from None
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
        bits = {f"load_in_{quantize}": True}
        if quantize == "4bit":
            bits |= {"bnb_4bit_compute_dtype": getattr(torch, dtype), "bnb_4bit_quant_type": "nf4"}
        more["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
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
    eos = _eos(model, tokenizer)
    pad = tokenizer.pad_token_id
    # A fresh one: what a model's own says of sampling must not mix with the user's.
    greedy = not decoding["temperature"]
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=decoding["max_new_tokens"],
        do_sample=not greedy,
        **(
            {}
            if greedy
            else {"temperature": decoding["temperature"], "top_k": 0, "top_p": decoding.get("top_p") or 1.0}
        ),
        eos_token_id=eos,
        pad_token_id=eos[0] if pad is None else pad,
    )
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


def _short(name):
    """A path without its folders, which are nobody's business."""
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
    except Exception:  # templates raise what they like
        return False


# --- Prompts ---


def prompt(model, messages):
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
    """Text in which no control token is left: data that holds one must not end its turn."""
    for token in _control_tokens(tokenizer):
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _control_tokens(tokenizer):
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)


def _prefix(model, unit):
    """(ids, cache) of what all prompts of a template have in common; the last one's is kept."""
    messages = unit.messages()
    key = units_lib.digest(messages[:-1])
    if key not in model.prefixes:
        model.prefixes.clear()
        model.prefixes[key] = _make_prefix(model, messages)
    return model.prefixes[key]


def _make_prefix(model, messages):
    import torch

    if not _plain_attention(model.model.config.get_text_config()):
        return [], None
    ids = [prompt(model, [*messages[:-1], {**messages[-1], "content": c}]) for c in "0x"]
    ids = ids[0][: _common(*ids)]
    if not ids:
        return [], None
    with torch.inference_mode():
        inputs = torch.tensor([ids], device=model.model.device)
        return ids, model.model(input_ids=inputs, use_cache=True, logits_to_keep=1).past_key_values


def _plain_attention(config):
    """Whether each layer attends to all before it: only then a cache can be cut and shared."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return not getattr(config, "sliding_window", None) and set(kinds) == {"full_attention"}


def _common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# --- Answering ---


def answer(
    units,
    journal,
    model,
    read,
    *,
    seed=0,
    batch_size=16,
    batch_tokens=65_536,
    progress=None,
    log=lambda text: print(text, file=sys.stderr, flush=True),
):
    """Has `model` answer all units that aren't settled; see `units` for the journal's records.

    A batch's replies, second ones to what couldn't be used included, are on the disk together.

    Args:
      units: all of the run, answered or not: batches are made of them.
      journal: see `journal`; replies are added to it.
      model: from `load`.
      read: `parse.read_reply`.
      seed: of sampling; each batch draws by (seed, its keys).
      batch_size: units in a batch, at most.
      batch_tokens: tokens in a batch, at most, prompts as long as the longest and replies as long
        as they may become; a unit that alone has more is asked alone.
      progress: called with the number of replies and of new tokens after each batch.
      log: called with a line when a batch didn't fit into memory.

    Raises:
      ValueError: one unit alone doesn't fit into memory.
    """
    # By these sums, and with them replies, may differ though all settings are the same.
    ran = {"batch_size": batch_size, "batch_tokens": batch_tokens, **_machine(model)}
    # Templates after each other: what their prompts have in common is computed once.
    groups = {}
    for unit in units:
        groups.setdefault(unit.template.digest, []).append(unit)
    size = WINDOW * batch_size
    for group in groups.values():
        for start in range(0, len(group), size):
            window = group[start : start + size]
            is_open = {u.key for u in window if not units_lib.settled(journal.replies(u.key))}
            if not is_open:
                continue
            prompts = {u.key: prompt(model, u.messages()) for u in window}
            for batch in plan(window, prompts, model.settings["max_new_tokens"], batch_size, batch_tokens):
                if any(u.key in is_open for u in batch):
                    records = _answer_batch(batch, prompts, model, read, seed, log)
                    # Of a batch that had been made of other units, some may be there.
                    new = [r for r in records if r["key"] in is_open]
                    new = [r | {"ran": ran} for r in new if r["attempt"] >= journal.count(r["key"])]
                    journal.add_many(new)
                    if progress:
                        progress(len(new), sum(r["usage"][1] for r in new))


def _machine(model):
    import torch

    device = model.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads()}


def plan(window, prompts, new_tokens, batch_size, batch_tokens):
    """Units in batches of similar length, within both limits; the same for the same units."""
    batches, longest = [[]], 0
    for unit in sorted(window, key=lambda u: (len(prompts[u.key]), u.number)):
        longest = len(prompts[unit.key])  # they come in order of length
        full = (len(batches[-1]) + 1) * (longest + new_tokens) > batch_tokens
        if batches[-1] and (full or len(batches[-1]) == batch_size):
            batches.append([])
        batches[-1].append(unit)
    return [b for b in batches if b]


def _answer_batch(batch, prompts, model, read, seed, log):
    """Records of the units' replies, first those of attempt 0, then of the second attempts."""
    out, room = [], model.limit - model.settings["max_new_tokens"]
    asked = [(u, prompts[u.key]) for u in batch]
    for attempt in range(units_lib.MAX_REPLIES):
        for unit, ids in asked:
            if len(ids) > room:
                problem = f"the prompt of {len(ids)} tokens leaves no room for a reply"
                out.append(_record(unit, attempt, "", units_lib.TOO_LONG, len(ids), 0, 0.0, problem, None, model))
        asked = [(u, ids) for u, ids in asked if len(ids) <= room]
        if not asked:
            break
        start = time.monotonic()
        replies = _generate(asked, model, seed, attempt, log)
        seconds = (time.monotonic() - start) / len(asked)
        again = []
        for (unit, ids), (text, finish, tokens) in zip(asked, replies):
            found = read(text, unit.template.kind, finish == "length")
            out.append(
                _record(
                    unit,
                    attempt,
                    text,
                    finish,
                    len(ids),
                    tokens,
                    seconds,
                    found.problem,
                    len(found.pairs) or None,
                    model,
                )
            )
            if not found.pairs and attempt + 1 < units_lib.MAX_REPLIES:
                again.append((unit, prompt(model, unit.messages(attempt + 1, found.problem))))
        asked = again
    return out


def _record(unit, attempt, text, finish, asked, tokens, seconds, problem, score, model):
    return dict(
        key=unit.key,
        score=score,
        reply=text,
        finish=finish,
        usage=[asked, tokens],
        model=None,
        time=round(time.time(), 3),
        attempt=attempt,
        row_id=unit.row.row_id,
        template=f"{unit.template.name}_v{unit.template.version}",
        problem=problem,
        seconds=round(seconds, 4),
        versions=model.versions,
        system_fingerprint=None,
    )


def _generate(asked, model, seed, attempt, log):
    """[(text, finish, new tokens)] of one batch; halves that don't fit into memory."""
    import torch

    try:
        return _generate_all(asked, model, seed, attempt)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not isinstance(e, torch.OutOfMemoryError):
            if "allocate memory" not in str(e):
                raise
        if len(asked) == 1:
            raise ValueError(
                f"{asked[0][0].row.row_id}: a prompt of {len(asked[0][1])} tokens doesn't fit into "
                "memory alone; expected more memory, or --quantize, or fewer --max_new_tokens."
            ) from None
    # Out of the except block, whose traceback holds what filled the memory.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(asked) // 2
    log(
        f"{len(asked)} replies at a time don't fit into memory: {half} and {len(asked) - half} now "
        "(a smaller --batch_size or --batch_tokens saves the attempt)"
    )
    return [r for part in (asked[:half], asked[half:]) for r in _generate(part, model, seed, attempt, log)]


def _generate_all(asked, model, seed, attempt):
    import torch

    net = model.model
    pad, eos = net.generation_config.pad_token_id, set(net.generation_config.eos_token_id)
    shared, cache = _prefix(model, asked[0][0])
    if any(ids[: len(shared)] != shared for _, ids in asked):
        shared, cache = [], None
    rest = [ids[len(shared) :] for _, ids in asked]
    width = max(map(len, rest))
    # [shared, padding, the rest]: what is masked doesn't count as a position.
    rows = [shared + [pad] * (width - len(r)) + r for r in rest]
    masks = [[1] * len(shared) + [0] * (width - len(r)) + [1] * len(r) for r in rest]
    inputs = dict(
        input_ids=torch.tensor(rows, device=net.device),
        attention_mask=torch.tensor(masks, device=net.device),
    )
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
        inputs["past_key_values"] = cache
    keys = [u.key for u, _ in asked]
    torch.manual_seed(int(units_lib.digest([seed, attempt, keys])[:15], 16))
    with torch.inference_mode():
        made = net.generate(**inputs)[:, len(shared) + width :].tolist()
    out = []
    for ids in made:
        end = next((i for i, t in enumerate(ids) if t in eos), None)
        text = model.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.encode("utf-8", "replace").decode()
        ended = end is not None
        out.append((text, "stop" if ended else "length", end + 1 if ended else len(ids)))
    return out
