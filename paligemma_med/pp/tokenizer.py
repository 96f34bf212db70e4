"""Tokenizers: Gemma's, read from a file the user has, and `tiny`, which ships with the package.

`get_tokenizer(spec)` reads the same specs as big_vision's configs:

    gemma(tokensets=("loc","seg"))                         file named by env PALIGEMMA_TOKENIZER
    gemma(tokensets=("loc","seg"), model="/path/to/file")  .model, tokenizer.json, tokenizer.json.gz
    tiny                                                   1,024 pieces, for models trained here

Ids: pad 0, eos 1, bos 2, unk 3; Gemma has 256,000 pieces, `<loc0000>`… from 256000 and `<seg000>`…
from 257024, which makes 257,152 with both token sets. A special token spelled out in a text ("<eos>")
is plain text, as in SentencePiece: a question must not be able to end itself.
"""

import functools
import gzip
import importlib.resources
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import sentencepiece

from paligemma_med.pp import files, registry

ENV = "PALIGEMMA_TOKENIZER"
GEMMA_PIECES = 256_000
# First id and names of each token set. The order is that of the embedding rows in the released
# checkpoints; another order would read other tokens' rows.
TOKENSETS = {
    "loc": (256_000, [f"<loc{i:04d}>" for i in range(1024)]),
    "seg": (257_024, [f"<seg{i:03d}>" for i in range(128)]),
}

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_UNKNOWN = " \u2047 "  # and the unknown token as this one
_MOST_BYTES, _MOST_IDS = 2**28, 2**24  # of a tokenizer.json; Gemma 3's has 2^25, and 2^18 ids
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

_HOW_TO_GET = (
    f"Gemma's tokenizer is not part of this package. Accept the licence and download it from"
    f" https://www.kaggle.com/models/google/paligemma or"
    f" https://huggingface.co/google/paligemma-3b-pt-224 (tokenizer.model or tokenizer.json), then"
    f" set the environment variable {ENV} to the file, or write"
    f' gemma(tokensets=("loc","seg"), model="/path/to/file"). The tokenizer `tiny` needs no file.'
)


class Tokenizer:
    """Text to token ids and back.

    Both file formats end up here, so that only the cutting of text into pieces can differ: token sets,
        BOS, EOS and decoding share this code.

        Attributes:
            pad_token, eos_token, bos_token: 0, 1, 2.
            vocab_size: number of ids, added token sets included.
    """

    pad_token, eos_token, bos_token = 0, 1, 2

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        surfaces: Sequence[bytes],
        literals: Mapping[str, Sequence[int]],
    ):
        """Users call `get_tokenizer` instead.

        Args:
            encode: text -> ids of the file's own pieces, without BOS or EOS.
            surfaces: for each id the UTF-8 bytes it stands for, empty for control tokens.
            literals: strings that are cut out of a text before anything else, with their ids.
        """
        self._encode = encode
        self._surfaces = surfaces
        self._literals = literals
        self._split = re.compile(f"({'|'.join(map(re.escape, literals))})") if literals else None

    @property
    def vocab_size(self) -> int:
        return len(self._surfaces)

    def to_int(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, with BOS first and EOS last where asked for.

        Every string has ids, since unknown characters become bytes; ValueError only for what isn't a
        string or isn't valid Unicode (a lone surrogate).
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, found {type(text).__name__}: {text!r}")
        text.encode("utf-8")  # UnicodeEncodeError is a ValueError; the C++ below would be vaguer
        ids = [self.bos_token] if bos else []
        for part in self._split.split(text) if self._split else [text]:
            if part in self._literals:
                ids += self._literals[part]
            elif part:
                ids += self._encode(part)
        return [*ids, self.eos_token] if eos else ids

    def to_str(self, tokens: Sequence[int], *, stop_at_eos: bool = True) -> str:
        """Text of `tokens` (a list or 1-D integer array), without pad, BOS and EOS.

        Args:
            tokens: ids; ValueError if one is outside the vocabulary.
            stop_at_eos: leave out what follows the first EOS.

        Bytes that are not UTF-8 become U+FFFD: a model may stop in the middle of a character.
        For `tiny`, `to_str(to_int(x)) == x` for every text. For Gemma, U+2581 comes back as a
        space, because that is how its files write one.
        """
        out = []
        for token in tokens:
            token = int(token)
            if token == self.eos_token and stop_at_eos:
                break
            if not 0 <= token < len(self._surfaces):
                raise ValueError(f"token {token} is not one of the {self.vocab_size} known")
            out.append(self._surfaces[token])
        return b"".join(out).decode("utf-8", errors="replace")


def get_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names; each file is read once per process.

    Args:
        spec: `tiny` or `gemma(tokensets=(…), model=…)`, see the top of this file.

    Raises:
        ValueError: unknown name or token set, or a file that is not Gemma's tokenizer.
        FileNotFoundError: no file; says where to get it.
    """
    name, args, kwargs = registry.parse_call(spec)
    if name == "tiny" and not args and not kwargs:
        return _tiny()
    if name != "gemma":
        raise ValueError(f'unknown tokenizer {spec!r}; known: tiny, gemma(tokensets=("loc","seg"), model="path")')
    unknown = set(kwargs) - {"tokensets", "model"}
    if len(args) > 2 or unknown or (args and "tokensets" in kwargs) or len(args) + len(kwargs) > 2:
        raise ValueError(f"{spec!r}: gemma takes tokensets=(…) and model='path' only")
    values = dict(zip(("tokensets", "model"), args)) | kwargs
    path = values.get("model") or os.environ.get(ENV)
    if not path:
        raise FileNotFoundError(f"no tokenizer file is named. {_HOW_TO_GET}")
    tokensets = values.get("tokensets") or ()
    return _gemma((tokensets,) if isinstance(tokensets, str) else tuple(tokensets), str(path))


@functools.cache
def _tiny() -> Tokenizer:
    model = importlib.resources.files("paligemma_med.pp") / "tiny_tokenizer.model"
    encode, surfaces, byte_ids = _read_sentencepiece(model.read_bytes())
    # SentencePiece would turn its character for a space into a space: spell that character in bytes.
    return Tokenizer(encode, surfaces, {_SPACE: [byte_ids[b] for b in _SPACE.encode()]})


@functools.cache
def _gemma(tokensets: tuple[str, ...], path: str) -> Tokenizer:
    encode, surfaces = read_file(path)
    literals = _tokenset_ids(tokensets)
    if len(surfaces) < GEMMA_PIECES:
        raise ValueError(f"{path}: expected Gemma's {GEMMA_PIECES} pieces, found {len(surfaces)}")
    # Hugging Face's PaliGemma files contain the token sets, which must then agree with ours.
    # Ids past the token sets (its <image>) have no row in big_vision's vocabulary.
    if literals:
        end = 1 + max(literals.values())
        own = surfaces[GEMMA_PIECES:end]
        surfaces = [*surfaces[:GEMMA_PIECES], *(token.encode() for token in literals)]
        for i, found in enumerate(own, GEMMA_PIECES):
            if found != surfaces[i]:
                raise ValueError(
                    f"{path}: expected token {surfaces[i].decode()} at id {i}, found {found.decode(errors='replace')!r}"
                )
    return Tokenizer(encode, surfaces, {token: [i] for token, i in literals.items()})


def read_file(path: str) -> tuple[Callable[[str], Sequence[int]], list[bytes]]:
    """A tokenizer's file: SentencePiece's `.model`, or a Hugging Face tokenizer.json (also gzipped).

    Returns:
        encode: text -> ids, without special ones.
        surfaces: for each id the UTF-8 bytes it stands for, empty for control tokens.

    Raises:
        ValueError: not such a file, or one whose special tokens aren't Gemma's.
        FileNotFoundError: no file; says where to get it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path!r}. {_HOW_TO_GET}")
    data = file.read_bytes()
    if files.is_lfs_pointer(data):
        raise ValueError(f"{path}: {files.lfs_message('a tokenizer')}")
    try:
        if file.name.endswith(".model"):
            encode, surfaces, _ = _read_sentencepiece(data)
        elif file.name.endswith((".json", ".json.gz")):
            encode, surfaces = _read_json(data)
        else:
            raise ValueError("expected a name that ends in .model, .json or .json.gz")
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return encode, surfaces


def _tokenset_ids(tokensets: tuple[str, ...]) -> dict[str, int]:
    """Token -> id of the named sets, which must follow Gemma's pieces without a gap."""
    if unknown := [name for name in tokensets if name not in TOKENSETS]:
        raise ValueError(f"unknown token sets {unknown}; known: {list(TOKENSETS)}")
    if "seg" in tokensets and "loc" not in tokensets:
        raise ValueError('tokenset "seg" needs "loc" too: its ids follow those of "loc"')
    ids = {}
    for name, (first, tokens) in TOKENSETS.items():
        if name in tokensets:
            ids |= {token: first + i for i, token in enumerate(tokens)}
    return ids


def _surface(piece: str) -> bytes:
    """The bytes that a piece stands for."""
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(_SPACE, " ").encode("utf-8")


def _check_special(found: dict[str, int]) -> None:
    expected = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    if found != expected:
        raise ValueError(f"expected special tokens {expected}, found {found}")


def _read_sentencepiece(data: bytes):
    """(encode, surfaces, byte -> id) of a serialised SentencePiece model."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = model.get_piece_size()
    except RuntimeError as e:
        raise ValueError(f"not a SentencePiece model ({len(data)} bytes): {e}") from e
    _check_special(dict(pad=model.pad_id(), eos=model.eos_id(), bos=model.bos_id(), unk=model.unk_id()))
    surfaces, byte_ids = [], {}
    for i in range(size):
        if model.is_control(i):
            surfaces.append(b"")
        elif model.is_unknown(i):
            surfaces.append(_UNKNOWN.encode())
        else:
            surfaces.append(_surface(model.id_to_piece(i)))
            if model.is_byte(i):
                byte_ids[surfaces[-1][0]] = i
    return model.encode, surfaces, byte_ids


def _read_json(data: bytes):
    """(encode, surfaces) of a Hugging Face tokenizer.json, gzipped or not."""
    import tokenizers  # here, since only this format needs it

    try:
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as f:
                data = f.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise ValueError(f"unpacked it has more than {_MOST_BYTES >> 20} MiB")
        model = tokenizers.Tokenizer.from_buffer(data)
    except Exception as e:  # tokenizers raises bare Exception, gzip several kinds
        raise ValueError(f"not a Hugging Face tokenizer.json ({len(data)} bytes): {e}") from e
    special = {name: model.token_to_id(f"<{name}>") for name in ("pad", "eos", "bos", "unk")}
    _check_special(special)
    # As in SentencePiece, "<eos>" in a text is five characters and not the end of it.
    model.encode_special_tokens = True
    vocab = model.get_vocab(with_added_tokens=True)
    if max(vocab.values()) >= _MOST_IDS:
        raise ValueError(f"expected ids below {_MOST_IDS:,}, found {max(vocab.values()):,}")
    surfaces = [b""] * (1 + max(vocab.values()))
    for piece, i in vocab.items():
        surfaces[i] = _surface(piece)
    for name, i in special.items():
        surfaces[i] = _UNKNOWN.encode() if name == "unk" else b""

    def encode(text):
        try:
            # add_special_tokens=False: the file's template would add a BOS of its own.
            return model.encode(text, add_special_tokens=False).ids
        except BaseException as e:
            # No Exception: so the library, which is in Rust, ends a regex of the file that takes too long.
            if type(e).__name__ != "PanicException":
                raise
            raise ValueError(f"the rules of the tokenizer's file fail on {text!r:.60}: {files.reason(e)}") from None

    return encode, surfaces
