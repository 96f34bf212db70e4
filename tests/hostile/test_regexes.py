"""Regexes in adapters and configs that would keep Python's engine for hours, or that it has no room for."""

import json
import re
import time

import pytest

from paligemma_med.checkpoints import CheckpointError, peft_config
from paligemma_med.models import lora_targets, parts
from paligemma_med.models.layers import lora
from paligemma_med.parallel import sharding
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
