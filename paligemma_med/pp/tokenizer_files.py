"""Files of tokenizers: SentencePiece's `.model`, and Hugging Face's tokenizer.json, as one `Vocabulary`.

What a file calls a token of its own (`<eos>`, `<start_of_image>`) is characters like others in a text that is encoded
here: whoever writes a question mustn't be able to end a turn. SentencePiece never matches its control pieces in a text,
but it does match "user-defined" ones, and Hugging Face's library matches all added ones; of these, only white space and
HTML tags, which are text, are matched here.
"""

import dataclasses
import gzip
import io
import re
import struct
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from paligemma_med.pp import files

SPACE = "\u2581"  # SentencePiece writes a space as this character
_UNKNOWN = " \u2047 "  # and the unknown token as this one
_MOST_BYTES, _MOST_IDS = 2**28, 2**24  # of a tokenizer.json; Gemma 3's has 2^25, and 2^18 ids
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Gemma's tokens for what stands in web pages.
_HTML = re.compile(
    "</?(?:a|b|bbox|blockquote|body|caption|code|div|em|footer|h[1-6]|html|i|iframe|img|li|s|span|strong|sub|sup|table|"
    "tbody|td|tfoot|th|thead|tr|u|ul)>"
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's file says.

    Attributes:
        encode: text -> ids, none of them of `special`; ValueError for a text that the file's rules fail on.
        surfaces: for each id the UTF-8 bytes it stands for; the name of those in `special`.
        special: name -> id of the tokens that have a meaning beyond their characters.
    """

    encode: Callable[[str], Sequence[int]]
    surfaces: list[bytes]
    special: dict[str, int]


def read(path: str, advice: str = "") -> Vocabulary:
    """A tokenizer's file: `.model`, `.json`, or `.json.gz`.

    Raises:
        ValueError: not such a file.
        FileNotFoundError: no file; ends with `advice`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path!r}.{advice and ' '}{advice}")
    data = file.read_bytes()
    if files.is_lfs_pointer(data):
        raise ValueError(f"{path}: {files.lfs_message('a tokenizer')}")
    try:
        if file.name.endswith(".model"):
            return read_sentencepiece(data)
        if file.name.endswith((".json", ".json.gz")):
            return _read_json(data)
        raise ValueError("expected a name that ends in .model, .json or .json.gz")
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def read_sentencepiece(data: bytes) -> Vocabulary:
    """The vocabulary of a serialised SentencePiece model."""
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = model.get_piece_size()
    except RuntimeError as e:
        raise ValueError(f"not a SentencePiece model ({len(data)} bytes): {e}") from e
    pieces = [model.id_to_piece(i) for i in range(size)]
    markup = {pieces[i]: i for i in _user_defined(data) if is_markup(pieces[i])}
    special = {piece: i for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)} | markup
    surfaces = [_surface(piece) for piece in pieces]
    if model.unk_id() >= 0:
        surfaces[model.unk_id()] = _UNKNOWN.encode()
    return Vocabulary(_without(markup, model.encode), surfaces, special)


class Piece(NamedTuple):
    """A piece of a SentencePiece model: its text, its score, and its type by SentencePiece's number (1 is normal, 4
    user-defined)."""

    name: str
    score: float
    kind: int


def parts_of_sentencepiece(data: bytes) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    """What SentencePiece's Python library doesn't tell of a serialised model: (pieces, trainer_spec, normalizer_spec),
    the last two by the numbers of their fields in sentencepiece_model.proto."""
    pieces, specs = [], {2: {}, 3: {}}
    for field, value in _fields(memoryview(data)):
        if field == 1:
            found = dict(_fields(value))
            score = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
            pieces.append(Piece(bytes(found.get(1, b"")).decode("utf-8"), score, found.get(3, 1)))
        elif field in specs:
            specs[field] = dict(_fields(value))
    return pieces, specs[2], specs[3]


def _user_defined(data):
    """Ids of a SentencePiece model's user-defined pieces."""
    out, count = [], 0
    for field, value in _fields(memoryview(data)):
        if field == 1:
            if any(number == 3 and kind == 4 for number, kind in _fields(value)):
                out.append(count)
            count += 1
    return out


def _fields(data):
    """(number, value) of each field of a protocol buffer: an int, or the bytes of anything longer."""

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    place = 0
    while place < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[place : place + size]
        place += size


def _read_json(data: bytes) -> Vocabulary:
    """The vocabulary of a Hugging Face tokenizer.json, gzipped or not."""
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
    # As in SentencePiece, "<eos>" in a text is five characters and not the end of it.
    model.encode_special_tokens = True
    vocab = model.get_vocab(with_added_tokens=True)
    if max(vocab.values(), default=0) >= _MOST_IDS:
        raise ValueError(f"expected ids below {_MOST_IDS:,}, found {max(vocab.values()):,}")
    added = model.get_added_tokens_decoder()
    markup = {token.content: i for i, token in added.items() if not token.special and is_markup(token.content)}
    special = {token.content: i for i, token in added.items() if token.special} | markup
    is_bytes = model.decoder is not None and b'"ByteLevel"' in model.decoder.__getstate__()
    surfaces = [b""] * (1 + max(vocab.values(), default=-1))
    for piece, i in vocab.items():
        surfaces[i] = _from_byte_level(piece) if is_bytes and i not in added else _surface(piece)
    if "<unk>" in special:
        surfaces[special["<unk>"]] = _UNKNOWN.encode()

    def encode(text):
        try:
            # add_special_tokens=False: the file's template would add a BOS of its own.
            return model.encode(text, add_special_tokens=False).ids
        except BaseException as e:
            # No Exception: so the library, which is in Rust, ends a regex of the file that takes too long.
            if type(e).__name__ != "PanicException":
                raise
            raise ValueError(f"the rules of the tokenizer's file fail on {text!r:.60}: {files.reason(e)}") from None

    return Vocabulary(_without(markup, encode), surfaces, special)


def is_markup(piece):
    """Whether a piece looks like a token with a meaning: `<…>` or `[…]`, but no HTML tag and no byte."""
    ends = (piece[:1], piece[-1:])
    return (
        len(piece) > 2 and ends in (("<", ">"), ("[", "]")) and not (_HTML.fullmatch(piece) or _BYTE.fullmatch(piece))
    )


def _without(names: Collection[str], encode) -> Callable[[str], Sequence[int]]:
    """`encode` for which `names` are characters like others: each is cut behind its first one."""
    if not names:
        return encode
    starts = re.compile("[" + "".join(sorted({re.escape(name[0]) for name in names})) + "]")
    lengths = sorted({len(name) for name in names})

    def cut(text):
        ids, done = [], 0
        for match in starts.finditer(text):
            i = match.start()
            if any(text[i : i + n] in names for n in lengths):
                ids += encode(text[done : i + 1])
                done = i + 1
        return [*ids, *encode(text[done:])] if done else encode(text)

    return cut


def _surface(piece: str) -> bytes:
    """The bytes that a piece stands for."""
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(SPACE, " ").encode("utf-8")


def _byte_level() -> dict[str, int]:
    """character -> byte of GPT-2's form of byte-level pieces: printable bytes of Latin-1 stand for themselves, the
    others, in their order, for the characters from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level()


def _from_byte_level(piece):
    try:
        return bytes(_BYTE_OF[c] for c in piece)
    except KeyError:  # a piece of the file that isn't in this form
        return piece.encode("utf-8")
