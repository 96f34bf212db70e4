"""SentencePiece models for families whose files can't be in a repository: a few real pieces at their real ids."""

import pathlib
import string


def write(path, size, *, words, controls, user_defined=(), blank_before=False):
    """Writes a byte-pair model of `size` pieces.

    Args:
      path: where.
      size: number of pieces; those that aren't given can't be made of any text.
      words: {piece: id}. What they are merged from, letter by letter, is added.
      controls, user_defined: {piece: id}.
      blank_before: whether each text has a blank put before it, as LLaMA's.
    """
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    kind = model_pb2.ModelProto.SentencePiece
    user_defined, taken = dict(user_defined), {}
    for pieces, of in ((controls, kind.CONTROL), (user_defined, kind.USER_DEFINED), (words, kind.NORMAL)):
        taken |= {i: (piece, kind.UNKNOWN if piece == "<unk>" else of) for piece, i in pieces.items()}
    free = iter([i for i in range(size - 1, 300, -1) if i not in taken])
    known = {piece for piece, _ in taken.values()}
    for word in words:
        for piece in (word[:n] for n in range(2, len(word))):
            if piece not in known:
                known.add(piece)
                taken[next(free)] = piece, kind.NORMAL
    for letter in sorted({*string.printable.strip(), "\u2581", *"".join(words)} - known):
        taken[next(free)] = letter, kind.NORMAL
    for byte in range(256):
        taken[next(free)] = f"<0x{byte:02X}>", kind.BYTE
    pieces = [(*taken.get(i, (f"\ue000{i}", kind.NORMAL)), -float(i)) for i in range(size)]
    save(path, pieces, controls, blank_before=blank_before)


def save(path, pieces, controls, *, blank_before=False):
    """Writes a byte-pair model of pieces [(piece, type, score), …]; controls as in `write`."""
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    proto = model_pb2.ModelProto()
    for piece, of, score in pieces:
        proto.pieces.add(piece=piece, score=score, type=of)
    trainer = proto.trainer_spec
    trainer.model_type = model_pb2.TrainerSpec.BPE
    trainer.byte_fallback = True
    for role, names in dict(pad=["<pad>"], eos=["<eos>", "</s>"], bos=["<bos>", "<s>"], unk=["<unk>"]).items():
        name = next((name for name in names if name in controls), None)
        setattr(trainer, f"{role}_id", -1 if name is None else controls[name])
        setattr(trainer, f"{role}_piece", name or names[0])
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = blank_before
    proto.normalizer_spec.remove_extra_whitespaces = False
    pathlib.Path(path).write_bytes(proto.SerializeToString())


SPECIAL = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<unused94>": 100, "<unused95>": 101}
TURNS = {"<start_of_turn>": 105, "<end_of_turn>": 106}
IMAGE = {"[multimodal]": 5, "<start_of_image>": 255_999, "<end_of_image>": 256_000}
TEXT = {"\n": 107, "\n\n": 108, "\n\n\n": 109, "\u2581\u2581": 138, "<b>": 201, "</s>": 212}
WORDS = {
    "user": 2364,
    "model": 4368,
    "Is": 4602,
    "\u2581there": 993,
    "\u2581a": 496,
    "\u2581fracture": 34_164,
    "two": 13_498,
    "spaces": 35_220,
    "?": 236_881,
}


def gemma3(path):
    """A model with Gemma 3's special tokens, and of its words those above; ids as in its real file."""
    write(path, 262_144, words=WORDS, controls=SPECIAL | TURNS, user_defined=IMAGE | TEXT)


def of_gguf(gguf_file, path):
    """The SentencePiece model of a GGUF file's tokens, types (SentencePiece's) and scores; needs the package `gguf`."""
    import gguf

    fields = gguf.GGUFReader(gguf_file).fields
    tokens, kinds, scores = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "token_type", "scores"))
    # Of user-defined ones it holds the text, where SentencePiece has its mark for a blank.
    pieces = [
        (t.replace(" ", "\u2581") if kind == 4 else t, kind, score) for t, kind, score in zip(tokens, kinds, scores)
    ]
    save(path, pieces, {name: tokens.index(name) for name in ("<pad>", "<eos>", "<bos>", "<unk>")})


def llama(path):
    """A model in the form of LLaMA 2's. The ids of its words aren't the real ones."""
    words = {"\u2581yes": 301, "\u2581[": 302, "INST": 303, "\u2581<": 304, "img": 305}
    write(path, 32_000, words=words, controls={"<unk>": 0, "<s>": 1, "</s>": 2}, blank_before=True)
