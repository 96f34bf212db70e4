"""Gemma's vocabulary as a SentencePiece model, for readers of that format: made from its JSON."""

import gzip
import json
import pathlib


def write(json_file, path):
    """Writes the SentencePiece model `path` of a gzipped tokenizer.json.

    Gemma's pieces are in the order in which they merge, so an id is a rank and `-id` a score.
    """
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    content = json.loads(gzip.decompress(pathlib.Path(json_file).read_bytes()))
    user_defined = {t["content"] for t in content["added_tokens"] if not t["special"]}
    kind = model_pb2.ModelProto.SentencePiece
    proto = model_pb2.ModelProto()
    for piece, i in sorted(content["model"]["vocab"].items(), key=lambda item: item[1]):
        entry = proto.pieces.add(piece=piece, score=-float(i), type=kind.NORMAL)
        if i < 4:
            entry.type = kind.UNKNOWN if i == 3 else kind.CONTROL
        elif piece == "\t":  # the json has the tab itself where the model has its byte
            entry.piece, entry.type = "<0x09>", kind.BYTE
        elif piece in user_defined:
            entry.type = kind.USER_DEFINED
        elif piece.startswith("<0x") and len(piece) == 6:
            entry.type = kind.BYTE
    proto.trainer_spec.model_type = model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id = 0, 1
    proto.trainer_spec.bos_id, proto.trainer_spec.unk_id = 2, 3
    proto.trainer_spec.pad_piece, proto.trainer_spec.eos_piece = "<pad>", "<eos>"
    proto.trainer_spec.bos_piece, proto.trainer_spec.unk_piece = "<bos>", "<unk>"
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    pathlib.Path(path).write_bytes(proto.SerializeToString())
