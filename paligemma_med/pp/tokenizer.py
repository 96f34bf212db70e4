"""Tokenizers: Gemma's, Gemma 3's, LLaMA's and others', from a file the user has, and `tiny`, which ships here.

`get_tokenizer(spec)` reads the same specs as big_vision's configs, and some more:

    gemma(tokensets=("loc","seg"))      PaliGemma's: 256,000 pieces, `<loc0000>`… from 256000, `<seg000>`… from 257024
    gemma3                              Gemma 3's and MedGemma's: 262,144 pieces; an answer ends with <end_of_turn>
    gemma3(eos="<eos>")                 the same for a model without turns, such as a pre-trained one
    llama                               LLaMA's and LLaMA 2's: 32,000 pieces, each text with a blank before it
    bpe                                 a tokenizer.json of LLaMA 3, BLOOM, SmolLM2 or another byte-level one
    bpe(bos="<s>", eos="</s>", pad="<pad>", stop=("<|eot_id|>",), size=250880)
    tiny                                1,024 pieces, for models trained here
    tiny(tokensets=("loc",))            the same with `<loc0000>`… from 1024: 2,048 tokens

All but `tiny` take model="/path/to/file", a SentencePiece `.model`, a tokenizer.json or tokenizer.json.gz; without it,
an environment variable names the file: PALIGEMMA_TOKENIZER, GEMMA3_TOKENIZER, LLAMA_TOKENIZER, BPE_TOKENIZER. A special
token spelled out in a text ("<eos>", "<end_of_turn>", "<loc0001>") is plain text, unless whoever encodes it says
otherwise: a question must not be able to end itself.
"""

import functools
import importlib.resources
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from paligemma_med.pp import registry, tokenizer_files

ENV = "PALIGEMMA_TOKENIZER"
_ENVS = {"gemma": ENV, "gemma3": "GEMMA3_TOKENIZER", "llama": "LLAMA_TOKENIZER", "bpe": "BPE_TOKENIZER"}
GEMMA_PIECES, GEMMA3_PIECES, LLAMA_PIECES = 256_000, 262_144, 32_000
# First id and names of each token set. The order is that of the embedding rows in the released
# checkpoints; another order would read other tokens' rows.
TOKENSETS = {
    "loc": (256_000, [f"<loc{i:04d}>" for i in range(1024)]),
    "seg": (257_024, [f"<seg{i:03d}>" for i in range(128)]),
}
_GEMMA_IDS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
_LLAMA_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2}
# Names of begin, end, further stops and padding in files of the kind `bpe`: LLaMA 3, BLOOM, SmolLM2.
_BPE_NAMES = [
    ("<|begin_of_text|>", "<|end_of_text|>", ("<|eom_id|>", "<|eot_id|>"), None),
    ("<s>", "</s>", (), "<pad>"),
    ("<|im_start|>", "<|im_end|>", ("<|endoftext|>",), "<|im_end|>"),
]

_HOW_TO_GET = {
    "gemma": "Gemma's tokenizer is not part of this package. Accept the licence and download it from"
    " https://www.kaggle.com/models/google/paligemma or"
    " https://huggingface.co/google/paligemma-3b-pt-224 (tokenizer.model or tokenizer.json)",
    "gemma3": "Gemma 3's tokenizer is not part of this package. Accept the licence and download it with MedGemma, from"
    " https://huggingface.co/google/medgemma-4b-it (tokenizer.model or tokenizer.json)",
    "llama": "LLaMA's tokenizer is not part of this package. Accept the licence and download it with the weights, from"
    " https://huggingface.co/meta-llama/Llama-2-7b-chat-hf (tokenizer.model)",
    "bpe": "This tokenizer is not part of this package: it is the file tokenizer.json beside a model's weights on"
    " Hugging Face",
}


def _advice(name):
    more = 'tokensets=("loc","seg"), ' if name == "gemma" else ""
    return (
        f"{_HOW_TO_GET[name]}, then set the environment variable {_ENVS[name]} to the file, or write"
        f' {name}({more}model="/path/to/file"). The tokenizer `tiny` needs no file.'
    )


class Tokenizer:
    """Text to token ids and back.

    All files end up here, so that only the cutting of text into pieces can differ: special tokens, BOS, EOS and
    decoding share this code.

    Attributes:
        pad_token, bos_token: ids.
        eos_token: id of what ends an answer in training.
        stop_tokens: ids, any of which ends an answer that is generated; eos_token is the first.
        special: name -> id of the tokens that mean more than their characters.
        tokensets: those of them that TOKENSETS adds.
        vocab_size: number of ids, added token sets included.
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        surfaces: Sequence[bytes],
        special: Mapping[str, int],
        *,
        pad_token: int = 0,
        eos_token: int = 1,
        bos_token: int = 2,
        stops: Sequence[int] = (),
        tokensets: Mapping[str, int] | None = None,
        hidden: Collection[int] | None = None,
    ):
        """Users call `get_tokenizer` instead.

        Args:
            encode: text -> ids of the file's own pieces, none of them special.
            surfaces: for each id the UTF-8 bytes it stands for.
            special: name -> id, without the token sets.
            pad_token, eos_token, bos_token: ids.
            stops: ids that end an answer beside eos_token.
            tokensets: name -> id.
            hidden: ids that leave nothing in a text; by default pad, EOS and BOS.
        """
        self.pad_token, self.eos_token, self.bos_token = pad_token, eos_token, bos_token
        self.stop_tokens = (eos_token, *(i for i in stops if i != eos_token))
        self.tokensets = dict(tokensets or {})
        self.special = {**special, **self.tokensets}
        self._encode, self._surfaces = encode, surfaces
        self._hidden = frozenset((pad_token, eos_token, bos_token) if hidden is None else hidden)
        # SentencePiece puts a blank before LLaMA's texts, which isn't part of them.
        self._prefix = b" " if self.vocab_size and self._bytes(encode("a"))[:1] == b" " else b""

    @property
    def vocab_size(self) -> int:
        return len(self._surfaces)

    def to_int(self, text: str, *, bos: bool = False, eos: bool = False, special: Collection[str] = ()) -> list[int]:
        """Token ids of `text`, with BOS first and EOS last where asked for.

        Args:
            text: every string has ids, since unknown characters become bytes; ValueError only for what isn't a string
                or isn't valid Unicode (a lone surrogate).
            bos, eos: whether to add them.
            special: names that are tokens in this text, not characters: some of `self.special`, or all. Not for what
                anybody writes, such as questions.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, found {type(text).__name__}: {text!r}")
        text.encode("utf-8")  # UnicodeEncodeError is a ValueError; the C++ below would be vaguer
        ids = [self.bos_token] if bos else []
        for part in _splitter(tuple(special)).split(text) if special else [text]:
            if special and part in special:
                ids.append(self.special[part])
            elif part:
                ids += self._encode(part)
        return [*ids, self.eos_token] if eos else ids

    def to_str(self, tokens: Sequence[int], *, stop_at_eos: bool = True) -> str:
        """Text of `tokens` (a list or 1-D integer array), without pad, BOS and EOS.

        Args:
            tokens: ids; ValueError if one is outside the vocabulary.
            stop_at_eos: leave out what follows the first stop token, and this one.

        Bytes that are not UTF-8 become U+FFFD: a model may stop in the middle of a character.
        For `tiny`, `to_str(to_int(x)) == x` for every text. For Gemma, U+2581 comes back as a
        space, because that is how its files write one.
        """
        if stop_at_eos:
            tokens = self.answer(tokens)
        return self._bytes(tokens).removeprefix(self._prefix).decode("utf-8", errors="replace")

    def to_piece(self, token: int) -> str:
        """Text of one token as a part of a longer one, "" for pad, BOS and EOS."""
        return self._bytes([token]).decode("utf-8", errors="replace")

    def answer(self, tokens: Sequence[int]) -> list[int]:
        """The ids before the first stop token."""
        tokens = [int(token) for token in tokens]
        return tokens[: next((i for i, token in enumerate(tokens) if token in self.stop_tokens), None)]

    def _bytes(self, tokens):
        out = []
        for token in map(int, tokens):
            if not 0 <= token < len(self._surfaces):
                raise ValueError(f"token {token} is not one of the {self.vocab_size} known")
            out.append(b"" if token in self._hidden else self._surfaces[token])
        return b"".join(out)


@functools.lru_cache(maxsize=8)
def _splitter(names):
    """Cuts names out of a text; of two that begin alike, the longer one."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")


def get_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names; each file is read once per process.

    Args:
        spec: see the top of this file.

    Raises:
        ValueError: unknown name, argument or token set, or a file of another tokenizer.
        FileNotFoundError: no file; says where to get it.
    """
    name, path, values = _parsed(spec)
    for key in values.keys() & {"tokensets", "stop"}:
        value = values[key] or ()
        values[key] = (value,) if isinstance(value, str) else tuple(value)
    return _tiny(**values) if name == "tiny" else _READERS[name][0](path, **values)


def file_of(spec: str) -> tuple[str, str]:
    """(name, file) of the tokenizer that `spec` names; errors as of `get_tokenizer`, but the file isn't read."""
    name, path, _ = _parsed(spec)
    return name, path


def _parsed(spec):
    """(name, path of its file, its other arguments) of a spec."""
    name, args, kwargs = registry.parse_call(spec)
    if name == "tiny" and not args and not {*kwargs} - {"tokensets"}:
        return name, str(_TINY), kwargs
    if name not in _READERS:
        known = ", ".join(
            ["tiny", 'tiny(tokensets=("loc",))', 'gemma(tokensets=("loc","seg"), model="path")', *list(_READERS)[1:]]
        )
        raise ValueError(f"unknown tokenizer {spec!r}; known: {known}")
    _, names = _READERS[name]
    values = dict(zip(names, args)) | kwargs
    if len(args) > len(names) or {*values} - {*names} or len(values) < len(args) + len(kwargs):
        raise ValueError(f"{spec!r}: {name} takes {', '.join(f'{k}={v}' for k, v in names.items())} only")
    path = values.pop("model", None) or os.environ.get(_ENVS[name])
    if not path:
        raise FileNotFoundError(f"no tokenizer file is named. {_advice(name)}")
    return name, str(path), values


_TINY = importlib.resources.files("paligemma_med.pp") / "tiny_tokenizer.model"


@functools.cache
def _tiny(tokensets: tuple[str, ...] = ()) -> Tokenizer:
    found = tokenizer_files.read_sentencepiece(_TINY.read_bytes())
    mark = tokenizer_files.SPACE
    # SentencePiece would turn its character for a space into a space: spell that character in bytes.
    in_bytes = [found.surfaces.index(bytes([b])) for b in mark.encode()]

    def encode(text):
        first, *more = text.split(mark)
        ids = [*found.encode(first)]
        for part in more:
            ids += [*in_bytes, *found.encode(part)]
        return ids

    sets = _tokenset_ids(tokensets, first=len(found.surfaces))
    surfaces = [*found.surfaces, *(token.encode() for token in sets)]
    return Tokenizer(encode, surfaces, found.special, tokensets=sets)


@functools.cache
def _gemma(path: str, tokensets: tuple[str, ...] = ()) -> Tokenizer:
    sets = _tokenset_ids(tokensets)
    found = _read(path, "gemma", _GEMMA_IDS, GEMMA_PIECES)
    surfaces = found.surfaces
    # Hugging Face's PaliGemma files contain the token sets, which must then agree with ours.
    # Ids past the token sets (its <image>) have no row in big_vision's vocabulary.
    if sets:
        own = surfaces[GEMMA_PIECES : 1 + max(sets.values())]
        surfaces = [*surfaces[:GEMMA_PIECES], *(token.encode() for token in sets)]
        for i, piece in enumerate(own, GEMMA_PIECES):
            if piece != surfaces[i]:
                raise ValueError(
                    f"{path}: expected token {surfaces[i].decode()} at id {i}, found {piece.decode(errors='replace')!r}"
                )
    special = {name: i for name, i in found.special.items() if i < GEMMA_PIECES}
    return Tokenizer(found.encode, surfaces, special, tokensets=sets)


@functools.cache
def _gemma3(path: str, eos: str = "<end_of_turn>") -> Tokenizer:
    found = _read(path, "gemma3", _GEMMA_IDS, GEMMA3_PIECES)
    # Hugging Face's files have tokens past these for places of an image, which have no row here.
    special = {name: i for name, i in found.special.items() if i < GEMMA3_PIECES}
    return Tokenizer(
        found.encode,
        found.surfaces[:GEMMA3_PIECES],
        special,
        eos_token=_id(special, eos, path),
        stops=[1, *(special[name] for name in ("<end_of_turn>",) if name in special and eos != "<eos>")],
        hidden=(0, 1, 2),
    )


@functools.cache
def _llama(path: str) -> Tokenizer:
    found = _read(path, "llama", _LLAMA_IDS, LLAMA_PIECES)
    # It has no token for padding. What stands there doesn't matter, since it is masked.
    return Tokenizer(found.encode, found.surfaces, found.special, eos_token=2, bos_token=1, hidden=(1, 2))


@functools.cache
def _bpe(path: str, bos=None, eos=None, pad=None, stop: tuple[str, ...] = (), size: int = 0) -> Tokenizer:
    found = tokenizer_files.read(path, _advice("bpe"))
    special = found.special
    for names in _BPE_NAMES if eos is None else ():
        if names[0] in special and names[1] in special:
            bos, eos, pad = bos or names[0], names[1], pad or names[3]
            stop = stop or tuple(name for name in names[2] if name in special)
            break
    if eos is None:
        raise ValueError(
            f"{path}: no known name of a token that ends an answer; say which one does: bpe(eos=…, bos=…), some of "
            f"{sorted(special)[:20]}"
        )
    bos_token, eos_token = _id(special, bos or eos, path), _id(special, eos, path)
    pad_token = 0 if pad is None or pad not in special else special[pad]
    surfaces = found.surfaces
    if size and size < len(surfaces):
        raise ValueError(f"{path}: size={size}, but it has {len(surfaces)} tokens.")
    hidden = {bos_token, eos_token, *({pad_token} if pad in special else ())}
    return Tokenizer(
        found.encode,
        [*surfaces, *[b""] * (size - len(surfaces))],  # rows of a model that stand for nothing
        special,
        pad_token=pad_token,
        eos_token=eos_token,
        bos_token=bos_token,
        stops=[_id(special, name, path) for name in stop],
        hidden=hidden,
    )


_READERS = {
    "gemma": (lambda path, **kw: _gemma(path, **kw), dict(tokensets="(…)", model="'path'")),
    "gemma3": (lambda path, **kw: _gemma3(path, **kw), dict(model="'path'", eos="'<eos>'")),
    "llama": (lambda path: _llama(path), dict(model="'path'")),
    "bpe": (
        lambda path, **kw: _bpe(path, **kw),
        dict(model="'path'", bos="'…'", eos="'…'", pad="'…'", stop="('…',)", size="0"),
    ),
}


def _read(path, name, ids, pieces):
    """The `Vocabulary` of a file with these special ids and at least so many pieces."""
    found = tokenizer_files.read(path, _advice(name))
    special = {token: found.special.get(token) for token in ids}
    if special != ids:
        raise ValueError(f"{path}: expected special tokens {ids}, found {special}")
    if len(found.surfaces) < pieces:
        of = {"gemma": "Gemma's", "gemma3": "Gemma 3's", "llama": "LLaMA's"}[name]
        raise ValueError(f"{path}: expected {of} {pieces} pieces, found {len(found.surfaces)}")
    return found


def _id(special, name, path):
    if name not in special:
        raise ValueError(f"{path}: it has no token {name!r}; expected one of {sorted(special)[:20]}")
    return special[name]


def _tokenset_ids(tokensets: tuple[str, ...], first: int = GEMMA_PIECES) -> dict[str, int]:
    """Token -> id of the named sets, which must follow the `first` pieces, Gemma's or others, without a gap."""
    if unknown := [name for name in tokensets if name not in TOKENSETS]:
        raise ValueError(f"unknown token sets {unknown}; known: {list(TOKENSETS)}")
    if "seg" in tokensets and "loc" not in tokensets:
        raise ValueError('tokenset "seg" needs "loc" too: its ids follow those of "loc"')
    ids = {}
    for name, (of_gemma, tokens) in TOKENSETS.items():
        if name in tokensets:
            ids |= {token: of_gemma - GEMMA_PIECES + first + i for i, token in enumerate(tokens)}
    return ids
