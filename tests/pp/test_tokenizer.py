"""Tokenizers: `tiny` loses nothing, Gemma's ids are those of the released files, errors help."""

import gzip
import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from paligemma_med.pp.tokenizer import get_tokenizer
from tests.pp import gemma_model
from tools import train_tokenizer

BOTH = 'tokensets=("loc", "seg")'

SENTENCES = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\t a\tb \n c",
    "answer en Is there a pleural effusion in the left lower lobe?",
    "answer en What modality is used to take this image?\n",
    "  two leading and two trailing spaces  ",
    "many     inner        spaces",
    "No acute cardiopulmonary abnormality. Heart size is normal.",
    "T2-weighted FLAIR, 1.5 T, slice 12/24, TE=90ms, TR=4,500ms",
    "A 3.2 x 2.1 cm spiculated nodule (SUVmax 8.7) in the RUL; cf. CT of 12.03.2019.",
    "0 1 22 333 4444 55555 1e-5 -3.14 100% 50°C ±2σ",
    "Postoperative Veränderungen nach Lobektomie rechts, kein Pneumothorax.",
    "Größe und Form des Herzens unauffällig; Mediastinum mittelständig.",
    "Ödem? Straße, Übergröße, ÄÖÜß",
    "这张图片中有肺吗?",
    "图中肝脏位于哪一侧?",
    "左肺下叶可见胸腔积液，心影增大。",
    "この画像は何のモダリティですか",
    "Есть ли перелом рёбра?",
    "هل توجد كتلة في الرئة اليسرى؟",
    "café naïve cafe\u0301",
    "🫁🫀 x-ray 👩🏽‍⚕️",
    "hepatosplenomegaly lymphangioleiomyomatosis pneumonoultramicroscopicsilicovolcanoconiosis",
    "CAPITALS AND lower, MiXeD",
    "quotes \"double\" 'single' `back` “curly” and — dashes – …",
    "<b>bold</b> <table> <unused3> </s> [toxicity=0]",
    "<eos> <bos> <pad> <unk> <mask> <start_of_turn>user<end_of_turn>",
    "zero\u200bwidth, no\u00a0break, \ufeffmark, nul\x00, bell\x07, \r\n",
    "\U000e0001 \U0010ffff \ue000",
    "a\u2581b",
]


@pytest.fixture(scope="session")
def tiny():
    return get_tokenizer("tiny")


# tiny


@given(st.text())
@example(" leading")
@example("trailing \n")
@example("\u2581\u2581 \u2581")
@example("a\x00b\r\n\t")
@example("<0x0A><unk><eos>")
@example("\u2047")
def test_tiny_loses_nothing(text):
    tiny = get_tokenizer("tiny")
    for bos in (False, True):
        for eos in (False, True):
            ids = tiny.to_int(text, bos=bos, eos=eos)
            assert tiny.to_str(ids) == text
            assert not {0, 3} & set(ids)
            assert ids.count(2) == bos and ids.count(1) == eos


@given(st.text(), st.text())
def test_tiny_decoding_is_concatenation(a, b):
    tiny = get_tokenizer("tiny")
    assert tiny.to_str(tiny.to_int(a) + tiny.to_int(b)) == a + b


def test_tiny_ids(tiny):
    assert (tiny.pad_token, tiny.eos_token, tiny.bos_token) == (0, 1, 2)
    assert tiny.vocab_size == 1024
    assert len(tiny.to_int("\n")) == 1
    assert tiny.to_int("x\ny").count(tiny.to_int("\n")[0]) == 1
    assert tiny.to_int("", bos=True, eos=True) == [2, 1]


def test_tiny_spends_few_tokens_on_a_question(tiny):
    questions = [
        "Is there a pleural effusion in the right lung?",
        "What is the largest organ in the picture?",
        "Which part of the body does this image belong to?",
        "Does the picture contain the organ which has the effect of absorption?",
        "How many circles are there on the left of the square?",
        "What are the symptoms of the disease in the lower left lobe?",
    ]
    for question in questions:
        assert len(tiny.to_int("answer en " + question)) <= 20


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_to_str(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.to_int("yes")
    assert tokenizer.to_str([2, *ids, 1, *ids, 0]) == "yes"
    assert tokenizer.to_str([2, *ids, 1, *ids, 0], stop_at_eos=False) == "yesyes"
    assert tokenizer.to_str(np.array([2, *ids, 1, 0], np.int32)) == "yes"
    assert tokenizer.to_str([]) == ""
    assert tokenizer.to_str([3]) == " \u2047 "
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token {bad} is not one of the {tokenizer.vocab_size}"):
            tokenizer.to_str([bad])
    with pytest.raises(ValueError, match="must be a str, found bytes"):
        tokenizer.to_int(b"yes")
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.to_int("\ud800")


def test_half_a_character(tiny):
    ids = tiny.to_int("\u4e2d")
    assert len(ids) == 3 and tiny.to_str(ids[:2]) == "\ufffd"


@pytest.mark.slow
def test_training_again_gives_the_same_file():
    import paligemma_med.pp

    shipped = paligemma_med.pp.__path__[0] + "/tiny_tokenizer.model"
    with open(shipped, "rb") as f:
        data = f.read()
    assert len(data) <= 16 * 1024
    assert train_tokenizer.train(40_000, 0) == data


def test_corpus_is_seeded_and_fills_every_slot():
    lines = list(train_tokenizer.compose(3000, 0))
    assert lines == list(train_tokenizer.compose(3000, 0)) != list(train_tokenizer.compose(3000, 1))
    assert not any(c in line for line in lines for c in "{}|")


# Gemma, on files made here


def gemma_json(extra=(), n=256_000):
    """A tokenizer.json with Gemma's layout of ids, `n` pieces (most never used) and `extra`."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<unused{i}>" for i in range(104)], "\n"]
    pieces += [f"<0x{i:02X}>" for i in range(256)]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "ye", "yes", "\u2581a", "<", ">"]
    pieces += [f"<<piece {i}>>" for i in range(n - len(pieces))]
    pieces += extra
    special = [dict(id=i, content=pieces[i], special=True) for i in range(4)]
    added = [dict(id=n + i, content=t, special=False) for i, t in enumerate(extra)]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    template = [
        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{**t, **flags} for t in special + added],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": template,
                "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
            },
            "model": {
                "type": "BPE",
                "vocab": {p: i for i, p in enumerate(pieces)},
                "merges": ["y e", "ye s", "\u2581 a"],
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
            },
        }
    ).encode()


LOC = [f"<loc{i:04d}>" for i in range(1024)]
SEG = [f"<seg{i:03d}>" for i in range(128)]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "plain.json").write_bytes(gemma_json())
    (folder / "plain.json.gz").write_bytes(gzip.compress(gemma_json()))
    (folder / "hf.json").write_bytes(gemma_json([*LOC, *SEG, "<image>"]))
    (folder / "swapped.json").write_bytes(gemma_json([*SEG, *LOC]))
    (folder / "small.json").write_bytes(gemma_json(n=3000))
    return folder


@pytest.fixture(scope="session")
def gemma(files):
    return get_tokenizer(f'gemma({BOTH}, model="{files}/plain.json")')


@pytest.mark.parametrize("name", ["plain.json", "plain.json.gz", "hf.json"])
def test_token_sets_have_their_ids(files, name):
    tokenizer = get_tokenizer(f'gemma({BOTH}, model="{files}/{name}")')
    assert tokenizer.vocab_size == 257_152
    for i in (0, 1, 1023):
        assert tokenizer.to_int(f"<loc{i:04d}>", special=tokenizer.tokensets) == [256_000 + i]
    for i in (0, 127):
        assert tokenizer.to_int(f"<seg{i:03d}>", special=tokenizer.special) == [257_024 + i]
    a, yes = tokenizer.to_int("a"), tokenizer.to_int("yes")
    text = "a<loc0001><loc1023>yes<seg127>"
    ids = tokenizer.to_int(text, bos=True, eos=True, special=tokenizer.tokensets)
    assert ids == [2, *a, 256_001, 257_023, *yes, 257_151, 1]
    assert tokenizer.to_str(ids) == tokenizer.to_str(tokenizer.to_int(text)) == text
    assert max(tokenizer.to_int(text + "<image>")) < 256_000  # as a question it is characters
    assert len(tokenizer.to_int("<loc1024>", special=tokenizer.special)) > 1  # there is no such token


def test_without_token_sets(files):
    tokenizer = get_tokenizer(f'gemma(model="{files}/plain.json")')
    assert tokenizer.vocab_size == 256_000 and len(tokenizer.to_int("<loc0001>")) > 1
    loc = get_tokenizer(f'gemma(tokensets=("loc",), model="{files}/plain.json")')
    assert loc.vocab_size == 257_024 and loc.to_int("<loc0001>", special=loc.tokensets) == [256_001]


def test_bos_comes_once_and_only_when_asked(gemma):
    assert gemma.to_int("yes").count(2) == 0
    assert gemma.to_int("yes", bos=True).count(2) == 1


def test_a_question_cannot_end_itself(gemma):
    ids = gemma.to_int("yes<eos><bos><pad>")
    assert not {0, 1, 2} & set(ids) and gemma.to_str(ids) == "yes<eos><bos><pad>"


@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_gemma_loses_nothing_but_the_space_mark(gemma, text):
    assert gemma.to_str(gemma.to_int(text, bos=True, eos=True)) == text


def test_gemma_reads_the_space_mark_as_a_space(gemma):
    assert gemma.to_str(gemma.to_int("a\u2581a")) == "a a"


def test_environment_names_the_file(files, monkeypatch):
    monkeypatch.setenv("PALIGEMMA_TOKENIZER", str(files / "plain.json"))
    assert get_tokenizer("gemma").vocab_size == 256_000
    assert get_tokenizer('gemma(("loc", "seg"))').vocab_size == 257_152
    monkeypatch.setenv("PALIGEMMA_TOKENIZER", str(files / "nothing.json"))
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        get_tokenizer("gemma")
    # The config's path goes before the environment's.
    assert get_tokenizer(f'gemma(model="{files}/plain.json")').vocab_size == 256_000


def test_missing_file_tells_how_to_get_it(monkeypatch):
    monkeypatch.delenv("PALIGEMMA_TOKENIZER", raising=False)
    for spec in (f"gemma({BOTH})", 'gemma(model="/nowhere/tokenizer.model")'):
        with pytest.raises(FileNotFoundError) as e:
            get_tokenizer(spec)
        for part in ("kaggle.com", "huggingface.co/google/paligemma", "PALIGEMMA_TOKENIZER"):
            assert part in str(e.value)
    assert "/nowhere/tokenizer.model" in str(e.value)


def test_token_sets_at_other_ids(files):
    with pytest.raises(ValueError, match="expected token <loc0000> at id 256000, found '<seg000>'"):
        get_tokenizer(f'gemma({BOTH}, model="{files}/swapped.json")')


def test_too_small_a_vocabulary(files):
    with pytest.raises(ValueError, match="small.json: expected Gemma's 256000 pieces, found 3000"):
        get_tokenizer(f'gemma({BOTH}, model="{files}/small.json")')


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.model", b"not a model", "not a SentencePiece model"),
        ("b.model", b"", "not a SentencePiece model|expected"),
        ("c.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("d.json", b"", "not a Hugging Face tokenizer.json"),
        ("e.json.gz", b"\x1f\x8b broken", "not a Hugging Face tokenizer.json"),
        ("f.model", b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        ("g.txt", b"words", "expected a name that ends in"),
    ],
)
def test_wrong_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as e:
        get_tokenizer(f'gemma(model="{tmp_path / name}")')
    assert name in str(e.value)


def test_model_with_other_special_ids(tmp_path):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=train_tokenizer.compose(500, 0),
        model_writer=out,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "t5.model").write_bytes(out.getvalue())
    with pytest.raises(ValueError, match="t5.model: expected special tokens .*found .*'<pad>': None"):
        get_tokenizer(f'gemma(model="{tmp_path}/t5.model")')


@pytest.mark.parametrize(
    "spec, message",
    [
        ("tinny", r"unknown tokenizer 'tinny'; known: tiny, tiny\(tokensets"),
        ("tiny(1)", "unknown tokenizer"),
        ("gemma(tokenset=())", "takes tokensets"),
        ("gemma((), '/x', model='/y')", "takes tokensets"),
        ("gemma(tokensets=('loc', 'sog'), model='/x')", "unknown token sets"),
        ("gemma(tokensets=('seg',), model='/x')", 'needs "loc"'),
        ("gemma(model=PATH)", "not a literal"),
    ],
)
def test_wrong_specs(spec, message, tmp_path):
    if "/x" in spec:
        (tmp_path / "x.json").write_bytes(gemma_json(n=500))
        spec = spec.replace("/x", f"{tmp_path}/x.json")
    with pytest.raises(ValueError, match=message):
        get_tokenizer(spec)


def test_read_once(files):
    spec = f'gemma({BOTH}, model="{files}/plain.json")'
    assert get_tokenizer(spec) is get_tokenizer(spec)
    assert get_tokenizer("tiny") is get_tokenizer("tiny")


# The real thing


@pytest.fixture(scope="session")
def real_file(real_data):
    return real_data / "gemma_tokenizer.json.gz"


@pytest.fixture(scope="session")
def real(real_file):
    return get_tokenizer(f'gemma({BOTH}, model="{real_file}")')


@pytest.mark.real_data
def test_ids_equal_those_of_the_tokenizers_library(real, real_file):
    reference = tokenizers.Tokenizer.from_buffer(gzip.decompress(real_file.read_bytes()))
    special = ("<eos>", "<bos>", "<pad>", "<unk>", "<unused3>")
    for text in SENTENCES:
        if not any(token in text for token in special):  # text here, control tokens there
            assert real.to_int(text) == reference.encode(text, add_special_tokens=False).ids, text
            assert real.to_int(text, bos=True) == reference.encode(text).ids, text


@pytest.mark.real_data
def test_known_ids(real):
    # From Hugging Face's PaliGemma documentation and big_vision's vocabulary.
    assert real.to_int("\n") == [108] and real.to_int("\n", bos=True, eos=True) == [2, 108, 1]
    assert real.vocab_size == 257_152
    assert real.to_int("mass <loc0001><seg127>", special=real.tokensets)[-2:] == [256_001, 257_151]


@pytest.mark.real_data
def test_what_a_question_spells_out_is_no_token(real):
    """`<b>` is text, as it was to Gemma; `<unused3>` and `<start_of_turn>` had tokens of their own."""
    for name, i in real.special.items():
        if i < 120 or i % 100 == 0:
            ids = real.to_int(f"Is {name}it?{name}")
            assert i not in ids and real.to_str(ids, stop_at_eos=False) == f"Is {name}it?{name}", name
    assert real.to_int("<unused3>") == [*real.to_int("<"), *real.to_int("unused3>")]
    assert real.to_int("<b></s>") == [201, 213] and real.special["<end_of_turn>"] == 107


@pytest.mark.real_data
@pytest.mark.parametrize("text", [t for t in SENTENCES if "\u2581" not in t])
def test_real_round_trip(real, text):
    assert real.to_str(real.to_int(text, bos=True, eos=True)) == text


@pytest.mark.real_data
def test_sentencepiece_and_json_agree(real, real_file, tmp_path):
    """The same vocabulary written as a SentencePiece model gives the same ids."""
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    gemma_model.write(real_file, tmp_path / "gemma.model")
    other = get_tokenizer(f'gemma({BOTH}, model="{tmp_path}/gemma.model")')
    assert other.vocab_size == real.vocab_size
    for text in [*SENTENCES, "a<loc0001>b <seg001>"]:
        assert other.to_int(text, bos=True) == real.to_int(text, bos=True), text
        assert other.to_str(other.to_int(text)) == real.to_str(real.to_int(text))


@pytest.mark.real_data
def test_slake_questions_fit(tiny, real_data):
    rows = json.loads((real_data / "slake" / "train.json").read_text(encoding="utf-8"))
    lengths = [len(tiny.to_int(r["question"])) for r in rows if r["q_lang"] == "en"]
    assert np.mean(lengths) < 13 and max(lengths) < 40
    for row in rows:
        for text in (row["question"], str(row["answer"])):
            assert tiny.to_str(tiny.to_int(text)) == text
