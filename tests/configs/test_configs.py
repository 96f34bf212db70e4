"""Every config builds what it says; the prompt is one and the same, and never holds the answer."""

import importlib
import io
import pathlib

import numpy as np
import PIL.Image
import pytest

from configs import common
from paligemma_med import experiment, optim
from paligemma_med.pp import get_preprocess_fn
from paligemma_med.pp.tokenizer import get_tokenizer

FOLDER = pathlib.Path(common.__file__).parent
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "common"))
ANSWER = "zygomatic zebra"


def get_config(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def row(**kw):
    """A question as the data sets have it."""
    out = io.BytesIO()
    PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(out, "PNG")
    texts = dict(question="Is the lung healthy?", answer=ANSWER, question_id="7", image_id="i3",
                 answer_type="OPEN", content_type="Organ", base_type="vqa")  # fmt: skip
    return {"image": out.getvalue(), **texts, **kw}


def pp(text):
    """The function of a pp string, with the shipped tokenizer instead of Gemma's file."""
    return get_preprocess_fn(text.replace(repr(common.GEMMA), "'tiny'"))


# --- Every config ---


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
    c = get_config(name)
    experiment.check_config(c)
    model = experiment.make_model(c)
    abstract = experiment.abstract_params(c, model)
    names = optim.trained_names(c, list(abstract))
    kw = dict(total_steps=1000, num_examples=5000, batch_size=c.input.batch_size)
    optim.make(c, names, **kw)
    assert c.input.batch_size % (c.get("grad_accum_steps") or 1) == 0
    again = experiment.config_from_json(importlib.import_module("json").loads(
        experiment.config_to_json(c)))  # fmt: skip
    assert experiment.make_model(again) == model
    assert optim.trained_names(again, list(abstract)) == names


@pytest.mark.parametrize("name", NAMES)
def test_pp_strings_give_what_the_model_reads(name):
    c = get_config(name)
    rng = np.random.default_rng(0)
    out = pp(c.input.pp)(row(answer="yes"), rng)
    assert out["image"].shape == (c.res, c.res, 3) and out["image"].dtype == np.float32
    assert np.abs(out["image"]).max() <= 1
    for key in ("text", "mask_ar", "mask_loss"):
        assert out[key].shape == (c.text_len + 1,)
    trained_on = out["text"][(out["mask_ar"] == 0)].tolist()
    strings = [s.pp_fn for s in (c.evals or {}).values()] + [c.get("predict_pp") or ""]
    for text in filter(None, strings):
        out = pp(text)(row(answer="yes"))
        assert out["image"].shape == (c.res, c.res, 3)
        assert out["text"][out["mask_input"] > 0].tolist() == trained_on, "another prompt"
    assert strings[-1], "predict needs predict_pp"


def test_stage1_trains_the_projection_head_alone():
    c = get_config("stage1_slake")
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    assert sum(x.size for x in abstract.values()) == 2_924_220_144
    names = optim.trained_names(c, list(abstract))
    assert sorted(names) == ["img/head/bias", "img/head/kernel"]
    dtypes = experiment.param_dtypes(c, abstract, names)
    assert {str(d) for n, d in dtypes.items() if n not in names} == {"bfloat16"}
    assert {str(dtypes[n]) for n in names} == {"float32"}
    table = experiment.describe_params(c, abstract, names)
    assert "2,361,344 parameters trained" in table
    assert "2,921,858,800 parameters frozen" in table
    line = next(s for s in table.splitlines() if s.startswith("img/head/kernel"))
    assert line.split() == ["img/head/kernel", "1152×2048", "float32", "trained", "img/head/.*"]
    assert c.input.batch_size == 96 and c.grad_accum_steps == 16
    assert (c.lr, c.wd, c.total_epochs, c.label_smoothing) == (1e-5, 0, 5, 0)
    small = get_config("stage1_slake", "res=224")
    abstract = experiment.abstract_params(small, experiment.make_model(small))
    assert sum(x.size for x in abstract.values()) == 2_923_335_408


# --- Arguments ---


def test_parse_arg():
    defaults = dict(init="", res=448, lr=1e-3, aug=False, extra=None)
    found = common.parse_arg("init=/a/b.npz,res=224,lr=1,aug,extra=3", **defaults)
    assert found.to_dict() == dict(init="/a/b.npz", res=224, lr=1, aug=True, extra=3)
    assert common.parse_arg(None, **defaults).to_dict() == defaults
    assert common.parse_arg("", **defaults).to_dict() == defaults
    assert common.parse_arg("extra=/x/y", extra=None).extra == "/x/y"
    assert common.parse_arg("init=1e3", init="").init == "1e3"


@pytest.mark.parametrize(
    "arg, message",
    [
        ("rse=224", "'rse' is unknown; known are \\['aug', 'lr', 'res'\\]"),
        ("res=2.5", "'res=2.5': expected int, as in res=448"),
        ("res=big", "'res=big': expected int"),
        ("res", "'res': expected int"),
        ("res=True", "'res=True': expected int"),
        ("lr=True", "'lr=True': expected float"),
        ("aug=0", "'aug=0': expected bool"),
        ("lr=__import__('os')", "expected float"),
    ],
)
def test_parse_arg_errors(arg, message):
    with pytest.raises(ValueError, match=message):
        common.parse_arg(arg, res=448, lr=1e-3, aug=False)


def test_unknown_key_is_refused():
    c = get_config("slake_mini")
    c.grad_accumulation = 2
    with pytest.raises(ValueError, match="unknown keys \\['grad_accumulation'\\]"):
        experiment.check_config(c)


# --- The prompt ---


def test_layout_of_a_training_row():
    tok = get_tokenizer("tiny")
    out = pp(common.train_pp(32, 63, "tiny"))(row())
    prompt = tok.to_int("answer en Is the lung healthy?", bos=True) + tok.to_int("\n")
    answer = tok.to_int(ANSWER, eos=True)
    pad = 64 - len(prompt) - len(answer)
    assert pad > 0
    assert out["text"].tolist() == prompt + answer + [0] * pad
    assert out["mask_ar"].tolist() == [0] * len(prompt) + [1] * (len(answer) + pad)
    assert out["mask_loss"].tolist() == [0] * len(prompt) + [1] * len(answer) + [0] * pad
    assert set(out) == {"image", "text", "mask_ar", "mask_loss"}


def test_layout_of_an_evaluation_row():
    tok = get_tokenizer("tiny")
    out = pp(common.eval_pp(32, 40, "tiny"))(row())
    prompt = tok.to_int("answer en Is the lung healthy?", bos=True) + tok.to_int("\n")
    pad = 40 - len(prompt)
    assert out["text"].tolist() == prompt + [0] * pad
    assert out["mask_input"].tolist() == [1] * len(prompt) + [0] * pad
    assert out["mask_ar"].tolist() == [0] * len(prompt) + [1] * pad
    assert out["answer"] == ANSWER and out["question_id"] == "7"


def test_answer_is_never_in_the_prompt():
    tok = get_tokenizer("tiny")
    f = pp(common.eval_pp(32, 40, "tiny"))
    prompts = [f(row(answer=a))["text"].tolist() for a in (ANSWER, "no")]
    assert prompts[0] == prompts[1]
    assert "zeb" not in tok.to_str(prompts[0])
    # The known trap: data that calls its answer `suffix`.
    assert f(row(suffix=ANSWER))["text"].tolist() == prompts[0]


def test_what_is_cut_is_counted():
    out = pp(common.train_pp(32, 10, "tiny"))(row())
    whole = pp(common.train_pp(32, 63, "tiny"))(row())
    assert out["text"].shape == (11,)
    assert out["_truncated"] == (whole["text"] != 0).sum() - 11
    out = pp(common.eval_pp(32, 8, "tiny"))(row())
    assert out["_truncated"] > 0
