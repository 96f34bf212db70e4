"""What big_vision's config files import is there while they are read, and at no other time."""

import importlib
import sys

import numpy as np
import pytest

from configs import common
from paligemma_med.config import stand_ins
from paligemma_med.pp import get_preprocess_fn

COMMON = "big_vision.configs.common"
TRANSFERS = "big_vision.configs.proj.paligemma.transfers.common"


@pytest.fixture(autouse=True)
def _no_checkout(monkeypatch):
    monkeypatch.delenv("BIG_VISION_DIR", raising=False)


def write_checkout(folder, name):
    """A folder that looks like a checkout, whose parse_arg gives `name`."""
    configs = folder / "big_vision" / "configs"
    configs.mkdir(parents=True)
    (folder / "big_vision" / "__init__.py").touch()
    (configs / "__init__.py").touch()
    (configs / "common.py").write_text(f"def parse_arg(arg, **kw):\n    return {name!r}\n")
    return folder


def loaded():
    return importlib.import_module(COMMON).parse_arg("")


# --- When it can be imported, and from where ---


def test_only_within_the_context():
    path, finders = list(sys.path), list(sys.meta_path)
    with stand_ins.importable("/some/config.py"):
        assert importlib.import_module(COMMON).parse_arg is stand_ins.parse_arg
        assert importlib.import_module(TRANSFERS).TOKENIZER == common.GEMMA
    assert (sys.path, sys.meta_path) == (path, finders)
    assert not [name for name in sys.modules if name.split(".")[0] == "big_vision"]


def test_the_checkout_that_the_file_lies_in_counts_first(tmp_path, monkeypatch):
    own, installed, named = (write_checkout(tmp_path / n, n) for n in ("own", "installed", "named"))
    file = own / "big_vision" / "configs" / "proj" / "x.py"
    with stand_ins.importable(tmp_path / "x.py"):
        assert loaded() != "named"
    monkeypatch.setenv("BIG_VISION_DIR", str(named))
    with stand_ins.importable(tmp_path / "x.py"):
        assert loaded() == "named"
    monkeypatch.syspath_prepend(str(installed))
    with stand_ins.importable(tmp_path / "x.py"):
        assert loaded() == "installed"
    with stand_ins.importable(file):
        assert loaded() == "own"
    monkeypatch.setenv("BIG_VISION_DIR", str(tmp_path / "nowhere"))
    with stand_ins.importable():
        assert loaded() == "installed"


def test_what_is_not_supplied_says_how_to_have_it():
    how = "set BIG_VISION_DIR to a checkout"
    with stand_ins.importable():
        with pytest.raises(ModuleNotFoundError, match=f"big_vision.utils isn't here: {how}"):
            importlib.import_module("big_vision.utils")
        with pytest.raises(ImportError, match=f"{COMMON} has no 'format_str' here: {how}"):
            importlib.import_module(COMMON).format_str("")


# --- parse_arg ---


@pytest.mark.parametrize(
    "arg, expected",
    [
        (None, dict(res=224, mode="xm", fast=False, lr=1e-3)),
        ("", dict(res=224, mode="xm", fast=False, lr=1e-3)),
        ("448", dict(res=448, mode="xm", fast=False, lr=1e-3)),
        ("fast", dict(res=224, mode="xm", fast=True, lr=1e-3)),
        ("fast,lr=1,mode=a=b", dict(res=224, mode="a=b", fast=True, lr=1.0)),
        ("fast=false,res=64", dict(res=64, mode="xm", fast=False, lr=1e-3)),
        ("fast=", dict(res=224, mode="xm", fast=False, lr=1e-3)),
        ("mode=", dict(res=224, mode="", fast=False, lr=1e-3)),
    ],
)
def test_parse_arg(arg, expected):
    found = stand_ins.parse_arg(arg, res=224, mode="xm", fast=False, lr=(1e-3, float))
    assert found.to_dict() == expected
    assert [type(found[k]) for k in expected] == [type(v) for v in expected.values()]


def test_parse_arg_without_defaults():
    assert stand_ins.parse_arg("").to_dict() == {}
    assert stand_ins.parse_arg("a=1,b=x,c,d=0.5,e=True", lazy=True).to_dict() == dict(a=1, b="x", c=True, d=0.5, e=True)


@pytest.mark.parametrize(
    "arg, message",
    [
        ("rse=1", r"'rse' is unknown; known are \['fast', 'res'\]"),
        ("res=big", "res='big': expected int"),
        ("fast=1", "fast='1': expected bool"),
    ],
)
def test_parse_arg_errors(arg, message):
    with pytest.raises(ValueError, match=message):
        stand_ins.parse_arg(arg, res=224, fast=False)


# --- pp strings ---


def run_pp(text):
    text = text.replace(repr(stand_ins.TOKENIZER), "'tiny'")
    row = dict(image=np.zeros((4, 4, 3), np.uint8), question="Is it healthy?", answer="yes", question_id="7")
    return get_preprocess_fn(text)(row, None)


def test_its_pp_gives_what_ours_gives():
    prompt = 'strfmt("answer en {question}", outkey="prefix")'
    ours = common.train_pp(4, 20, stand_ins.TOKENIZER).replace("decode(precise=True)|", "")
    image = "resize(4, antialias=True)|value_range(-1, 1)"
    train = stand_ins.combine_and_keep_train(20, before=(image, prompt, 'copy("answer", "suffix")'))
    expected, found = run_pp(ours), run_pp(train)
    assert set(found) == set(expected)
    assert all(np.array_equal(found[k], expected[k]) for k in found)

    ours = common.eval_pp(4, 20, stand_ins.TOKENIZER, keep=("question_id",)).replace("decode(precise=True)|", "")
    evaluated = stand_ins.combine_and_keep_eval(20, keep=("question_id",), before=(image, prompt))
    expected, found = run_pp(ours), run_pp(evaluated)
    assert set(found) == set(expected) and found["question_id"] == "7"
    assert all(np.array_equal(found[k], expected[k]) for k in found)
    spaced = run_pp(stand_ins.combine_and_keep_train(20, before=(image, prompt, 'copy("answer", "suffix")'), sep=" "))
    assert not np.array_equal(spaced["text"], run_pp(train)["text"])


def test_a_config_file_finds_its_neighbours_whatever_else_has_their_packages_name(tmp_path, monkeypatch):
    """As in a folder with a configs/ of its own, where an installed config is read."""
    for name in ("theirs", "ours"):
        folder = tmp_path / name / "some_configs"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "common.py").write_text(f"NAME = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "theirs")
    common = importlib.import_module("some_configs.common")
    file = tmp_path / "ours" / "some_configs" / "x.py"
    file.touch()
    with stand_ins.importable(str(file)):
        assert importlib.import_module("some_configs.common").NAME == "ours"
    assert importlib.import_module("some_configs.common") is common and common.NAME == "theirs"
    with stand_ins.importable(str(tmp_path / "theirs" / "some_configs" / "common.py")):
        assert importlib.import_module("some_configs.common") is common
