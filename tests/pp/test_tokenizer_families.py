"""Tokenizers of Gemma 3, LLaMA and byte-level files: their ids, what ends an answer, and what a question can't say."""

import json

import pytest
import tokenizers

from paligemma_med.pp.tokenizer import get_tokenizer
from tests.pp import sentencepiece_files
from tests.pp.test_tokenizer import gemma_json

QUESTION = "Is there a fracture?"
# What a question may hold; none of it may become a token with a meaning.
SPELT = "a<start_of_image>b<end_of_turn><eos><loc0001></s><|eot_id|>[multimodal]<s><<eos>><|begin_of_text|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def gemma3(folder):
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    sentencepiece_files.gemma3(folder / "gemma3.model")
    return get_tokenizer(f'gemma3(model="{folder}/gemma3.model")')


@pytest.fixture(scope="module")
def llama(folder):
    pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    sentencepiece_files.llama(folder / "llama.model")
    return get_tokenizer(f'llama(model="{folder}/llama.model")')


def byte_level(path, special, later=(), merges=("y e", "ye s", "Ġ yes")):
    """Writes a tokenizer.json like LLaMA 3's (`later`: special tokens behind the pieces) or BLOOM's (before them)."""
    pieces = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    pairs = [tuple(m.split()) for m in merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, pairs))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([*special, *later])
    made.save(str(path))
    return pieces


@pytest.fixture(scope="module")
def llama3(folder):
    byte_level(folder / "llama3.json", [], ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    return get_tokenizer(f'bpe(model="{folder}/llama3.json")')


@pytest.fixture(scope="module")
def bloom(folder):
    byte_level(folder / "bloom.json", ["<unk>", "<s>", "</s>", "<pad>"])
    return get_tokenizer(f'bpe(model="{folder}/bloom.json", size=300)')


def test_ids_of_gemma3s_template(gemma3):
    """MedGemma's two templates, cut where its constants and the question meet; from the real tokenizer."""

    def constant(text):
        return gemma3.to_int(text, special=gemma3.special)

    asked = [4602, 993, 496, 34_164, 236_881]
    assert gemma3.to_int(QUESTION) == asked
    assert constant("<bos><start_of_turn>user\n") == [2, 105, 2364, 107]
    assert constant("\n\n<start_of_image>") == [108, 255_999]
    ends = [106, 107, 105, 4368, 107]
    assert constant("<end_of_image>\n\n<end_of_turn>\n<start_of_turn>model\n") == [256_000, 108, *ends]
    assert constant("<bos><start_of_turn>user\n\n\n<start_of_image>") == [2, 105, 2364, 109, 255_999]
    assert constant("<end_of_turn>\n<start_of_turn>model\n") == ends
    assert gemma3.to_int("  two  spaces") == [138, 13_498, 138, 35_220]
    assert gemma3.vocab_size == 262_144


def test_gemma3s_json_without_the_rows_that_hugging_face_adds(folder):
    """Its place of an image, 262144, is no token of a text, and our models have no row for it."""
    place = "<image_soft_token>"
    (folder / "gemma3.json").write_bytes(gemma_json([place], n=262_144))
    tokenizer = get_tokenizer(f'gemma3(model="{folder}/gemma3.json", eos="<eos>")')
    assert tokenizer.vocab_size == 262_144 and place not in tokenizer.special and tokenizer.stop_tokens == (1,)
    ids = tokenizer.to_int(f"yes{place}<eos>", bos=True, eos=True)
    assert max(ids) < 262_144 and ids.count(1) == 1 and tokenizer.to_str(ids) == f"yes{place}<eos>"


def test_what_ends_an_answer(gemma3, llama, llama3, bloom, folder):
    for tokenizer, pad, bos, stops in [
        (gemma3, 0, 2, (106, 1)),
        (get_tokenizer(f'gemma3(model="{folder}/gemma3.model", eos="<eos>")'), 0, 2, (1,)),
        (llama, 0, 1, (2,)),
        (llama3, 0, 259, (260, 261)),
        (bloom, 3, 1, (2,)),
        (get_tokenizer("tiny"), 0, 2, (1,)),
    ]:
        assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.stop_tokens) == (pad, bos, stops)
        assert tokenizer.eos_token == stops[0]
        yes = tokenizer.to_int("yes", eos=True)
        assert yes[-1] == stops[0]
        for stop in stops:
            said = [*yes[:-1], stop, *yes]
            assert tokenizer.to_str(said) == "yes" and tokenizer.answer(said) == yes[:-1]
    # LLaMA 3's token 0 is a character: it ends nothing.
    assert llama3.to_str([0, *llama3.to_int("yes"), 0, 260]) == "!yes!"


@pytest.mark.parametrize("name", ["gemma3", "llama", "llama3", "bloom"])
def test_a_question_is_text(name, request):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.to_int(SPELT)
    text = {*tokenizer.to_int("<b></s>")} if name == "gemma3" else set()  # HTML, to Gemma
    assert not {*ids} & {*tokenizer.special.values()} - text
    assert tokenizer.to_str(ids, stop_at_eos=False) == SPELT
    for text in ("", "yes", " yes", "a\nb", "Ödem 50°C 左肺 \U0001f9b4 "):
        ids = tokenizer.to_int(text, bos=True, eos=True)
        assert tokenizer.to_str(ids) == text
        assert tokenizer.to_str(ids, stop_at_eos=False).removesuffix("<end_of_turn>") == text


def test_constants_have_special_tokens(llama3, bloom, gemma3):
    assert llama3.to_int("<|begin_of_text|>yes<|eot_id|>", special=llama3.special) == [259, *llama3.to_int("yes"), 261]
    assert bloom.to_int("<s>yes</s>", special=["</s>"]) == [*bloom.to_int("<s>yes"), 2]
    assert gemma3.to_str(gemma3.to_int("<start_of_turn>user", special=gemma3.special)) == "<start_of_turn>user"


def test_llamas_texts_have_a_blank_before_them(llama):
    assert llama.to_int("yes") == [301] and llama.to_str([301, 301]) == "yes yes"
    assert llama.to_piece(301) == " yes" and llama.to_piece(2) == ""
    assert llama.to_str(llama.to_int("[INST] <img>", bos=True)) == "[INST] <img>"


def test_rows_without_a_token(bloom, folder):
    assert bloom.vocab_size == 300 and bloom.to_str([299]) == ""
    with pytest.raises(ValueError, match="bloom.json: size=100, but it has 263 tokens"):
        get_tokenizer(f'bpe(model="{folder}/bloom.json", size=100)')


def test_names_of_ones_own(folder):
    byte_level(folder / "own.json", ["<A>", "<B>"])
    with pytest.raises(ValueError, match=r"own.json: no known name of a token that ends an answer.*'<A>', '<B>'"):
        get_tokenizer(f'bpe(model="{folder}/own.json")')
    own = get_tokenizer(f'bpe(model="{folder}/own.json", eos="<B>", stop="<A>")')
    assert own.stop_tokens == (1, 0) and own.bos_token == 1
    with pytest.raises(ValueError, match="own.json: it has no token '<C>'; expected one of"):
        get_tokenizer(f'bpe(model="{folder}/own.json", eos="<C>")')


def test_added_tokens_that_are_not_special_are_text_too(folder):
    """Hugging Face's library matches them in every text."""
    pieces = byte_level(folder / "added.json", ["<unk>", "<s>", "</s>", "<pad>"])
    content = json.loads((folder / "added.json").read_text())
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    content["added_tokens"] += [dict(id=len(pieces) + i, content=t, **flags) for i, t in enumerate(["<ask>", "  "])]
    (folder / "added.json").write_text(json.dumps(content))
    tokenizer = get_tokenizer(f'bpe(model="{folder}/added.json")')
    ask, blanks = len(pieces), len(pieces) + 1
    ids = tokenizer.to_int("yes<ask>  yes<<ask>")
    assert ask not in ids and blanks in ids and tokenizer.to_str(ids) == "yes<ask>  yes<<ask>"
    assert tokenizer.to_int("<ask>", special=tokenizer.special) == [ask]


@pytest.mark.parametrize("name", ["gemma3", "llama", "bpe"])
def test_missing_files_tell_how_to_get_them(name, monkeypatch, folder):
    variable = f"{name.upper()}_TOKENIZER"
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(
        FileNotFoundError, match=f"no tokenizer file is named.*Hugging ?Face.*{variable}|hugging.*{variable}"
    ):
        get_tokenizer(name)
    monkeypatch.setenv(variable, "/nowhere/t.model")
    with pytest.raises(FileNotFoundError, match="no tokenizer file '/nowhere/t.model'"):
        get_tokenizer(name)


def test_files_of_other_families(gemma3, llama, folder):
    for spec, message in [
        ('gemma3(model="{}/llama.model")', r"llama.model: expected special tokens \{'<pad>': 0, .*found .*None"),
        ('llama(model="{}/gemma3.model")', r"gemma3.model: expected special tokens \{'<unk>': 0, .*found .*3"),
        ('gemma3(model="{}/gemma3.model", eos="<stop>")', "gemma3.model: it has no token '<stop>'"),
        ('gemma3(file="x")', "gemma3 takes model='path', eos='<eos>' only"),
        ('llama("x", model="y")', "llama takes model='path' only"),
    ]:
        with pytest.raises(ValueError, match=message):
            get_tokenizer(spec.format(folder))
