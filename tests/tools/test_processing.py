"""Exports as transformers' user loads them, without a word about this project: the same tokens, pixels, logits and
answer as here; and what of a run transformers can't do is said."""

import gzip
import io
import json

import jax
import jinja2
import numpy as np
import PIL.Image
import pytest
import sentencepiece
import tokenizers
import torch
import transformers

from configs import tiny_base
from paligemma_med import weights
from paligemma_med.checkpoints import CheckpointError, hf, npz
from paligemma_med.checkpoints.hf import tokens
from paligemma_med.pp import get_preprocess_fn, tokenizer
from tests import tiny
from tests.pp import sentencepiece_files
from tools import processing
from tools.convert_checkpoint import convert

QUESTION = "How many circles are there?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the bundled model with a leaf of its own."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_base.get_config()
    config.model_init = tiny_base.BASE
    bias = np.asarray(npz.load_npz(tiny_base.BASE)["img"]["head"]["bias"], np.float32)
    tiny.write_workdir(folder / "run", config, {"img/head/bias": bias + 0.01})
    return str(folder / "run"), config


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "w"
    convert(run[0], folder, "hf")
    return folder


def picture():
    image = PIL.Image.new("RGB", (90, 70), (20, 20, 20))
    image.paste((200, 60, 60), (20, 10, 50, 60))
    out = io.BytesIO()
    image.save(out, "PNG")
    return image, out.getvalue()


def test_tokens_pixels_logits_and_the_greedy_answer_are_ours(run, exported):
    folder, config = run
    image, coded = picture()
    processor = transformers.AutoProcessor.from_pretrained(exported)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    row = get_preprocess_fn(config.predict_pp)({"image": coded, "question": QUESTION})
    ours = row["text"][row["mask_input"] > 0]
    n = processor.image_seq_length
    assert theirs["input_ids"][0, :n].tolist() == [1024] * n
    assert theirs["input_ids"][0, n:].tolist() == ours.tolist()
    np.testing.assert_allclose(theirs["pixel_values"][0].permute(1, 2, 0), row["image"], rtol=0, atol=1e-5)

    model = transformers.AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(**theirs).logits[0, n:, :1024].numpy()
    said = model.generate(**theirs)[0, n + len(ours) :].tolist()
    # One program for the prompt's logits and the answer, token by token: what follows isn't seen.
    text = np.concatenate([ours, np.zeros(8, np.int32)])[None]
    is_answer = np.arange(text.shape[1])[None] >= len(ours)
    lit, _, _, params = weights.load(config, folder)
    apply = jax.jit(lambda text: lit.apply({"params": params}, row["image"][None], text, is_answer.astype(np.int32))[0])
    for i in range(len(ours), text.shape[1]):
        logits = np.asarray(apply(text)[0], np.float32)
        text[0, i] = logits[i - 1].argmax()
        if text[0, i] == 1:
            break
    want = logits[: len(ours)]
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()
    assert said == text[0, len(ours) : i + 1].tolist() and said[-1] == 1 and len(said) > 1


def written(config, side=64, rows=1024):
    """(files, notes) of an export of a run with this config."""
    theirs = dict(bos_token_id=2, eos_token_id=1, pad_token_id=0, image_token_index=rows)
    found = processing.of_config(config, side)
    return processing.files(found, theirs, dict(resample=2, size=dict(height=side))), found


def changed(**kw):
    config = tiny_base.get_config().to_dict()
    return {**config, **{k: v(config[k]) for k, v in kw.items()}}


def test_bicubic_images_and_longer_prompts_are_followed():
    def pp(old):
        old = old.replace("antialias=True", "antialias=True, method='bicubic'")
        return old.replace("answer en {question}", "answer en {question} Say x.")

    made, found = written(changed(predict_pp=pp))
    assert made["preprocessor_config.json"]["resample"] == 3 and not found.notes
    assert found.prompt == ("answer en ", " Say x.") and made["generation_config.json"]["max_new_tokens"] == 16
    template = jinja2.Template(made["chat_template.jinja"])

    def ask(content):
        return template.render(messages=[dict(role="user", content=content)])

    parts = [dict(type="image"), dict(type="text", text="{{ 1 }}"), dict(type="text", text="?")]
    assert "<image>" not in made["chat_template.jinja"]  # vLLM puts it in front by itself
    assert ask(parts) == "answer en {{ 1 }}? Say x." and ask("A?") == "answer en A? Say x."


@pytest.mark.parametrize(
    "change, left, said",
    [
        (dict(predict_pp=lambda pp: pp.replace(", antialias=True", "")), "preprocessor_config.json", "made otherwise"),
        (
            dict(predict_pp=lambda pp: pp.replace("|tok(", "|lower(key='prefix')|tok(", 1)),
            "chat_template.jinja",
            "chat template isn't",
        ),
        (
            dict(predict_pp=lambda pp: pp.replace(", bos='yes'", "")),
            "chat_template.jinja",
            "isn't its question between",
        ),
        (dict(predict_pp=lambda pp: pp.replace("{question}", "{question} {choice_a}")), "tokenizer.json", "choice_a"),
        (dict(tokenizer=lambda _: "gemma(model='/nowhere.model')"), "tokenizer.json", "no tokenizer file '/nowhere"),
        (dict(tokenizer=lambda _: "llama(model='/nowhere.model')"), "tokenizer.json", "the run has llama"),
        (dict(predict_pp=lambda _: None), "tokenizer.json", "source has no predict_pp"),
    ],
    ids=["not antialiased", "lower case", "without BOS", "choices", "no file", "another", "not recorded"],
)
def test_what_transformers_cannot_do_is_said_and_not_written(change, left, said):
    made, found = written(changed(**change))
    assert left not in made and any(said in note for note in found.notes)


def test_a_tokenizer_that_does_not_fit_costs_no_export(run, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="1,?000 rows.*has ids up to 1023"):
        tokens.make(tokenizer.file_of("tiny")[1], 1000)
    convert(tiny_base.BASE, tmp_path / "w", "hf")
    assert (
        "The tokenizer and the chat template aren't written (--processor=DIR copies them): the source has"
        in capsys.readouterr().err
    )
    assert hf.open_hf(tmp_path / "w") and not (tmp_path / "w/tokenizer.json").exists()


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path):
    made = tokens.make(tokenizer.file_of("tiny")[1], 1024)
    theirs = made["tokenizer.json"]
    del theirs["model"]["vocab"][tokens.IMAGE]
    theirs["added_tokens"] = [t for t in theirs["added_tokens"] if t["content"] != tokens.IMAGE]
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(json.dumps(theirs).encode()))
    assert tokens.make(tmp_path / "t.json.gz", 1024) == tokens.make(tokenizer.file_of("tiny")[1], 1024)
    theirs["normalizer"] = dict(type="Lowercase")
    (tmp_path / "t.json").write_text(json.dumps(theirs))
    with pytest.raises(CheckpointError, match="t.json: not a tokenizer of Gemma's"):
        tokens.make(tmp_path / "t.json", 1024)
    sentencepiece_files.llama(tmp_path / "llama.model")
    with pytest.raises(CheckpointError, match="llama.model: expected a SentencePiece model as Gemma's"):
        tokens.make(tmp_path / "llama.model", 32_000)


def test_two_tabs_are_one_piece_as_in_sentencepiece(tmp_path):
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "\t\t"]
    kinds = [3, 3, 3, 2, *[6] * 256, 1, 1, 1]  # SentencePiece's numbers
    pieces = [(name, kind, -float(i)) for i, (name, kind) in enumerate(zip(names, kinds, strict=True))]
    sentencepiece_files.save(tmp_path / "t.model", pieces, {name: i for i, name in enumerate(names[:4])})
    made = tokens.make(tmp_path / "t.model", len(names))["tokenizer.json"]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(made))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    for text in ("a\ta", "a\t\ta", "\t\t\t"):
        assert theirs.encode(text).ids == model.encode(text)


@pytest.mark.parametrize("text", ["a\tb\t\tc", "  two  blanks \n\n", "\u6f22\u5b57 caf\u00e9 <b>x</b> 3.5cm?", ""])
def test_texts_have_our_ids(exported, text):
    theirs = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.get_tokenizer("tiny").to_int(text)


def test_ids_without_a_piece_get_a_name_since_none_may_be_free():
    made = tokens.make(tokenizer.file_of("tiny")[1], 1030)["tokenizer.json"]
    ids = made["model"]["vocab"]
    assert sorted(ids.values()) == [*range(1031)] and ids[tokens.IMAGE] == 1030
    assert {t["content"]: t["id"] for t in made["added_tokens"]}[tokens.IMAGE] == 1030
    made, found = written(changed(tokenizer=lambda _: "tiny(tokensets=('loc',))"), rows=2048)
    theirs = tokenizers.Tokenizer.from_str(made["tokenizer.json"])
    assert theirs.encode("a<loc0003>").ids[-1] == 1027 and theirs.token_to_id(tokens.IMAGE) == 2048


def test_the_card_says_how_images_and_questions_are_read(exported):
    card = (exported / "README.md").read_text()
    assert "64 x 64 pixels by antialiased bilinear filtering" in card and "answer en {question}" in card.replace(
        "\\", ""
    )
    assert json.loads((exported / "tokenizer_config.json").read_text())["add_bos_token"] is False
    of_adapter = processing.told_of_adapter(changed())
    assert "image_processor.resample = 2" in of_adapter[0] and of_adapter[1].endswith("'answer en {question}'.")
    assert processing.told_of_adapter(changed(predict_pp=lambda _: None)) == []
