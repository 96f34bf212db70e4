"""PaliGemma's tokenizer as transformers reads it, made of the file that a run is trained with.

That file is a SentencePiece model or a tokenizer.json. In either, the ids up to the model's last row are the file's,
and those of the token sets behind them; `<image>`, which transformers writes for each image token, is the next one.
transformers 5 makes the tokenizer anew of the vocabulary and its merges and adds tokens behind them, so that a token of
a fixed id has to be in the vocabulary, and no id may be free.
"""

import gzip
import os
from collections.abc import Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.pp import json_text, tokenizer, tokenizer_files

IMAGE = "<image>"
SPECIAL = dict(pad_token=0, eos_token=1, bos_token=2, unk_token=3)  # ids, PaliGemma's
_NORMAL, _USER_DEFINED, _BPE = 1, 4, 2  # SentencePiece's numbers of kinds of pieces and of models


def make(path: os.PathLike | str, rows: int, tokensets: Mapping[str, int] | None = None) -> dict[str, dict[str, Any]]:
    """The files of a tokenizer: {"tokenizer.json": …, "tokenizer_config.json": …}.

    Args:
      path: SentencePiece's `.model`, or a tokenizer.json or tokenizer.json.gz, with Gemma's special tokens.
      rows: of the model's embedding; the id of `<image>`.
      tokensets: name -> id of tokens behind the file's own, if they aren't Gemma's of the same ids.

    Raises:
      CheckpointError: transformers' GemmaTokenizer cuts texts otherwise than the file says, or the ids don't fit.
    """
    path = os.path.expanduser(os.fspath(path))
    with open(path, "rb") as f:
        data = f.read()
    whole = _of_sentencepiece(data, path) if path.endswith(".model") else _of_json(data, path)
    model, added = whole["model"], {t["content"]: t for t in whole["added_tokens"]}
    vocab = model["vocab"]
    for name, token in added.items():
        vocab.setdefault(name, token["id"])
    sets = {first + i: name for first, names in tokenizer.TOKENSETS.values() for i, name in enumerate(names)}
    sets |= {i: name for name, i in (tokensets or {}).items()}
    _name_all(vocab, rows, sets, path)
    added |= {name: _added(name, i, False) for i, name in sets.items() if vocab.get(name) == i}
    added[IMAGE] = _added(IMAGE, rows, True)
    names = {i: name for name, i in vocab.items()}
    special = {role: names[i] for role, i in SPECIAL.items()}
    added |= {name: _added(name, vocab[name], True) for name in special.values()}
    whole["added_tokens"] = sorted(added.values(), key=lambda t: t["id"])
    return {"tokenizer.json": whole, "tokenizer_config.json": _config(special, added)}


def _name_all(vocab, rows, names, path):
    """Adds to {name: id} the ids that the file doesn't name, up to `<image>`'s; those of `names` have names."""
    ids = {i: name for name, i in vocab.items()}
    if vocab.get(IMAGE, rows) != rows or (max(ids) >= rows and IMAGE not in vocab):
        raise CheckpointError(
            f"{path}: its ids don't fit the model's {rows} rows, behind which {IMAGE} stands: it has ids up to "
            f"{max(ids)}" + (f", and {IMAGE} at {vocab[IMAGE]}" if IMAGE in vocab else "")
        )
    vocab |= {names.get(i, f"<row{i}>"): i for i in range(rows) if i not in ids}
    vocab[IMAGE] = rows


def _added(content, i, special):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return dict(id=i, content=content, **flags, special=special)


def _config(names, added):
    special = {t["id"]: t for t in added.values() if t["special"]}
    return dict(
        tokenizer_class="GemmaTokenizer",
        processor_class="PaliGemmaProcessor",
        **names,
        additional_special_tokens=[IMAGE],
        added_tokens_decoder={str(i): {k: v for k, v in t.items() if k != "id"} for i, t in special.items()},
        # The processor writes BOS behind the image tokens.
        add_bos_token=False,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        spaces_between_special_tokens=False,
        model_max_length=2**31,
    )


def _of_json(data, path):
    """A tokenizer.json, without what it puts before and behind each text: the processor does that."""
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        whole = json_text.parse(data, path, "a Hugging Face tokenizer.json", root=dict)
        kind, added = whole["model"]["type"], whole["added_tokens"]
    except (ValueError, OSError, EOFError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: not a Hugging Face tokenizer.json: {e}") from e
    # GemmaTokenizer's own rules, which it takes in place of the file's.
    rules = dict(type="Replace", pattern=dict(String=" "), content=tokenizer_files.SPACE)
    if kind != "BPE" or not whole["model"].get("byte_fallback") or whole.get("normalizer") != rules or not added:
        raise CheckpointError(f"{path}: not a tokenizer of Gemma's, by pairs of bytes, with blanks as its one rule")
    return dict(whole, post_processor=None)


def _of_sentencepiece(data, path):
    """A SentencePiece model as a tokenizer.json. Two pieces merge before others if they make one of a higher score."""
    pieces, trainer, normalizer = tokenizer_files.parts_of_sentencepiece(data)
    plain = trainer.get(3, 1) == _BPE and trainer.get(35, 0) and not normalizer.get(2)
    if not plain or normalizer.get(3, 1) or normalizer.get(4, 1):
        raise CheckpointError(
            f"{path}: expected a SentencePiece model as Gemma's, which transformers' GemmaTokenizer can compute: of "
            "pairs, with bytes for what isn't known, and texts taken as they are"
        )
    if not any(p.name == "\t" for p in pieces):
        # SentencePiece merges two tabs though it has a single one as a byte alone; a tokenizer.json merges pieces.
        pieces = [p._replace(name="\t", kind=_NORMAL) if p.name == "<0x09>" else p for p in pieces]
    vocab = {piece.name: i for i, piece in enumerate(pieces)}
    is_text = [p.kind == _USER_DEFINED and not tokenizer_files.is_markup(p.name) for p in pieces]
    merged = {p.name: (-p.score, i) for i, p in enumerate(pieces) if p.kind == _NORMAL or is_text[i]}
    merges = []
    for piece, rank in merged.items():
        for n in range(1, len(piece)):
            if piece[:n] in merged and piece[n:] in merged:
                merges.append((rank, n, f"{piece[:n]} {piece[n:]}"))
    merges.sort()
    # Matched before anything is merged, as there; blanks aren't blanks any more where tokens are looked for.
    added = [
        _added(p.name, i, False) for i, p in enumerate(pieces) if is_text[i] and tokenizer_files.SPACE not in p.name
    ]
    mark = dict(String=tokenizer_files.SPACE)
    steps = [dict(type="Replace", pattern=mark, content=" "), dict(type="ByteFallback"), dict(type="Fuse")]
    model = dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    model |= dict(
        type="BPE", unk_token=pieces[SPECIAL["unk_token"]].name, fuse_unk=True, byte_fallback=True, ignore_merges=False
    )
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=dict(type="Replace", pattern=dict(String=" "), content=tokenizer_files.SPACE),
        pre_tokenizer=None,
        post_processor=None,
        decoder=dict(type="Sequence", decoders=steps),
        model=dict(model, vocab=vocab, merges=[pair for *_, pair in merges]),
    )
