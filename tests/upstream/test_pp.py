"""Our pp strings mean the same in big_vision: texts and masks equal, images within 2 greys."""

import json

import pytest

from paligemma_med.pp import registry
from tests.pp import gemma_model
from tests.upstream.pp_strings import RANDOM, config_strings

# What our configs use: ops that big_vision has, and those of upstream.pp_ops.
THEIRS = {"decode", "resize", "value_range", "strfmt", "copy", "tok", "masked_concat", "tolen", "keep"}
ADDED = {"inception_crop", "brightness", "contrast"}


def test_configs_use_only_what_both_can_read():
    """An op that is new in a config has to be compared, or written for big_vision, first."""
    strings = config_strings()
    assert len(strings) > 40
    used = {registry.parse_call(op)[0] for pp in strings for op in registry.split(pp)}
    assert used == THEIRS | ADDED
    assert ADDED <= set(RANDOM)


def test_configs_decode_as_precisely_as_ours_does():
    for pp, where in config_strings().items():
        assert ("decode" in pp) == ("decode(precise=True)|" in pp), where


def test_no_bar_inside_of_an_argument():
    """big_vision cuts a pp string at every bar, in quotes too."""
    for pp, where in config_strings().items():
        assert registry.split(pp) == pp.split("|"), where
    assert registry.split("strfmt('a|b')") != "strfmt('a|b')".split("|")


def _compare(run_python, *args, **env):
    """What compare_pp prints: {where a string stands: dict(rows, grey, ops)}."""
    return json.loads(run_python("-m", "tests.upstream.compare_pp", *args, **env))


@pytest.mark.big_vision
def test_small_configs(run_python, tiny_data):
    found = _compare(run_python, tiny_data, "phantom", "test", "3", "slake_mini")
    assert len(found) == 7 and all(v["rows"] > 5 for v in found.values())


@pytest.mark.big_vision
@pytest.mark.slow
@pytest.mark.real_data
def test_all_configs_on_slake(run_python, real_data, tmp_path):
    from data_prep.build import build

    build("slake", config="all", manual_dir=real_data / "slake", data_dir=tmp_path)
    found = _compare(
        run_python,
        tmp_path,
        "slake/all",
        "test",
        "41",
        PALIGEMMA_TOKENIZER=str(real_data / "gemma_tokenizer.json.gz"),
    )
    assert len(found) > 40 and min(v["rows"] for v in found.values()) > 50
    assert {op for v in found.values() for op in v["ops"]} == THEIRS
    assert 0 < max(v["grey"] for v in found.values()) <= 2


@pytest.mark.big_vision
@pytest.mark.slow
def test_tokenizers_and_random_ops(run_python, tmp_path):
    texts = ["answer en Is there a mass?", "\n", "", "  two  spaces ", "µg ≤ 5", "<eos>", "肺"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    out = run_python("-m", "tests.upstream.compare_ops", tmp_path / "texts.json")
    assert "tokenizers agree on 7 texts, 1024 tokens" in out and "calls go where they belong" in out


@pytest.mark.big_vision
@pytest.mark.slow
@pytest.mark.real_data
def test_tokenizers_on_slake(run_python, real_data, tmp_path):
    texts = set()
    for split in ("train", "validate", "test"):
        rows = json.loads((real_data / "slake" / f"{split}.json").read_text(encoding="utf-8"))
        texts |= {str(row[key]) for row in rows for key in ("question", "answer")}
    (tmp_path / "texts.json").write_text(json.dumps(sorted(texts)))
    gemma_json, model = real_data / "gemma_tokenizer.json.gz", tmp_path / "gemma.model"
    gemma_model.write(gemma_json, model)
    out = run_python("-m", "tests.upstream.compare_ops", tmp_path / "texts.json", gemma_json, model)
    assert out.count(f"agree on {len(texts) + 1} texts, 257152 tokens") == 2


@pytest.mark.big_vision
@pytest.mark.slow
def test_boxes_have_the_same_text(run_python):
    assert "the same text for 502 boxes" in run_python("-m", "tests.upstream.compare_boxes")
