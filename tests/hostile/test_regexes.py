"""Regexes in adapters and configs that would keep Python's engine for hours, or that it has no room for."""

import gzip
import json
import re
import time

import pytest

from data_prep.curate import relevance, rules
from data_prep.files import DataError
from paligemma_med.checkpoints import CheckpointError, peft_config
from paligemma_med.models import lora_targets, parts
from paligemma_med.models.layers import lora
from paligemma_med.parallel import sharding
from paligemma_med.pp import tokenizer_files
from paligemma_med.training import optim

SLOW = ("(([a-z._0-9])+)+!", "(.*)*(.*)*(.*)*!", "(?!(([a-z._0-9])+)+!)(([a-z._0-9])+)+!")
WRONG = ("(", "a{1001}", "((?=a)b)+", r"(a)\1", "(?:" * 6000 + "a{9}{9}{9}" + "){9}" * 6000, "\ud800")
MODULES = [f"base_model.model.model.language_model.layers.{i}.self_attn.q_projection" for i in range(40)]


@pytest.fixture(autouse=True)
def soon():
    before = time.process_time()
    yield
    assert time.process_time() - before < 20  # with Python's engine, hours


def written(tmp_path, **fields):
    config = dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=["q_proj"]) | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return str(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("regex", SLOW)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_modules_of_an_adapter(tmp_path, key, regex):
    config = peft_config.read(written(tmp_path, **{key: regex}))
    assert not any(peft_config.is_targeted(config, name) for name in MODULES)


@pytest.mark.parametrize("regex", SLOW[:2])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_an_adapter(tmp_path, key, regex):
    config = peft_config.read(written(tmp_path, **{key: {regex: 4}}))
    assert {peft_config.by_pattern(config[key], name, 7) for name in MODULES} == {7}


@pytest.mark.parametrize("regex", WRONG[:-1])  # JSON's own reader refuses half a pair
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_adapters_wrong_regex_is_a_sentence(tmp_path, key, regex):
    path = written(tmp_path, **{key: {regex: 4} if key.endswith("pattern") else regex})
    says = rf"^{re.escape(path)}: {key} .* is not a regular expression of RE2's syntax"
    with pytest.raises(CheckpointError, match=says) as e:
        peft_config.read(path)
    assert len(str(e.value)) < 500 and "\n" not in str(e.value)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_an_adapter_has_no_million_names(tmp_path, key):
    many = [f"q{i}" for i in range(10_001)]
    path = written(tmp_path, **{key: dict.fromkeys(many, 4) if key.endswith("pattern") else many})
    with pytest.raises(CheckpointError, match=f"{key} has 10,001 entries; expected 10,000 at most"):
        peft_config.read(path)


USES = {
    "lora": lambda regex: lora_targets.resolve([(regex, dict(rank=4))], list(parts.LEAVES)),
    "lora, found": lambda regex: lora.find(lora.as_rules([(regex, dict(rank=4)), (".*", None)]), "llm/layers/attn/w"),
    "config.schedule": lambda regex: optim.match_names(list(parts.LEAVES), [(regex, 1.0)], "config.schedule"),
    "sharding_strategy": lambda regex: sharding.plan({}, [(regex, "replicate")], sharding.make_mesh()),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("regex", SLOW)
def test_rules_of_a_config(use, regex):
    if use == "lora, found":
        assert USES[use](regex) is None
        return
    with pytest.raises(ValueError, match="matches no"):
        USES[use](regex)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("regex", WRONG)
def test_a_configs_wrong_regex_is_a_sentence(use, regex):
    with pytest.raises(ValueError, match=rf"^{use.partition(',')[0]}: .* is not a regular expression of RE2's") as e:
        USES[use](regex)
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)


def tokenizer_json(regex=None, last=None):
    """A Hugging Face tokenizer.json with Gemma's special tokens, one rule for cutting texts and perhaps one more id."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocab = {piece: i for i, piece in enumerate([*special, *"abc!▁"])} | ({} if last is None else {"z": last})
    added = [
        dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i, t in enumerate(special)
    ]
    split = dict(type="Split", pattern={"Regex": regex}, behavior="Isolated", invert=False)
    model = dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None)
    return json.dumps(
        dict(
            version="1.0",
            truncation=None,
            padding=None,
            added_tokens=added,
            normalizer=None,
            pre_tokenizer=split if regex else None,
            post_processor=None,
            decoder=None,
            model=model | dict(fuse_unk=True, byte_fallback=False, vocab=vocab, merges=[]),
        )
    ).encode()


def test_a_tokenizers_rule_without_end_is_a_sentence(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json())
    assert len(tokenizer_files.read(str(path)).encode("abc")) == 3
    path.write_bytes(tokenizer_json("(a+)+$!"))
    with pytest.raises(ValueError, match="the rules of the tokenizer's file fail on 'aaaa"):
        tokenizer_files.read(str(path)).encode("a" * 40 + "?")


def test_a_tokenizers_file_takes_no_more_memory_than_one(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_json(last=2**31))
    with pytest.raises(ValueError, match="expected ids below 16,777,216, found 2,147,483,648"):
        tokenizer_files.read(str(path))
    path.write_bytes(gzip.compress(bytes(2**21 + 1)))
    monkeypatch.setattr(tokenizer_files, "_MOST_BYTES", 2**21)
    with pytest.raises(ValueError, match="unpacked it has more than 2 MiB"):
        tokenizer_files.read(str(path))


@pytest.mark.parametrize("regex", ["(", "a{99999999999999999999}", "(?:" * 6000 + ")" * 6000])
def test_what_is_wrong_with_a_rule_of_curation_is_a_sentence(regex):
    """Curation's rules are its user's own, and Python's."""
    with pytest.raises(DataError, match=r"^rules\[0\] \(pattern\): ") as e:
        rules.make_rules([dict(rule="pattern", patterns=[regex])])
    assert len(str(e.value)) < 300
    with pytest.raises(DataError, match="^relevance.keywords: ") as e:
        relevance.Relevance(keywords=[("x", regex)])
    assert len(str(e.value)) < 300
