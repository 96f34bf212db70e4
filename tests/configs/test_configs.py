"""Every config builds what it says; the prompt is one and the same, and never holds the answer."""

import ast
import importlib
import io
import pathlib

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from configs import common
from paligemma_med import checkpoints, experiment
from paligemma_med.config import files as config_files
from paligemma_med.config import values as config_values
from paligemma_med.evaluators import vqa
from paligemma_med.input_pipeline import mixture
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.pp import get_preprocess_fn, rows
from paligemma_med.pp.tokenizer import get_tokenizer
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import describe, optim

FOLDER = pathlib.Path(common.__file__).parent
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith(("__", "common")))
SYSTEMS = ("bloom_qformer", "llama_clip", "medgemma_4b", "pefomed")
STAGE2 = [n for n in NAMES if n.startswith("stage2_")]
ANSWER = "zygomatic zebra"


def get_config(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def row(**kw):
    """A question as the data sets have it."""
    out = io.BytesIO()
    PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(out, "PNG")
    texts = dict(
        question="Is the lung healthy?",
        answer=ANSWER,
        question_id="7",
        image_id="i3",
        answer_type="OPEN",
        content_type="Organ",
        base_type="vqa",
        answer_letter="C",
        **{f"choice_{x}": f"option {x}" for x in "abcd"},
    )
    return {"image": out.getvalue(), "boxes": dict(label=[], bbox=[]), **texts, **kw}


def pp(text):
    """The function of a pp string, with the shipped tokenizer instead of one that needs a file."""
    for spec in (common.GEMMA, "gemma3", "llama", "bpe", "bpe(size=250880)"):
        text = text.replace(repr(spec), "'tiny'")
    return get_preprocess_fn(text)


# --- Every config ---


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name):
    c = get_config(name)
    config_values.checked(c)
    model = experiment.make_model(c)
    abstract = experiment.abstract_params(c, model)
    names = optim.trained_names(c, list(abstract))
    kw = dict(total_steps=1000, num_examples=5000, batch_size=c.input.batch_size)
    optim.make(c, names, **kw)
    assert c.input.batch_size % (c.get("grad_accum_steps") or 1) == 0
    again = config_files.from_json(importlib.import_module("json").loads(config_files.to_json(c)))
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
    trained_on, place = out["text"][: out["mask_loss"].argmax()].tolist(), out.get("image_at")
    for section in (s for s in (c.evals or {}).values() if s.type == "perplexity"):
        again = pp(section.pp_fn)(row(answer="yes"))  # the loss is that of training
        assert all((again[key] == out[key]).all() for key in ("text", "mask_ar", "mask_loss"))
    strings = [s.pp_fn for s in (c.evals or {}).values() if s.type != "perplexity"] + [c.get("predict_pp") or ""]
    for text in filter(None, strings):
        out = pp(text)(row(answer="yes"))
        assert out["image"].shape == (c.res, c.res, 3)
        assert out["text"][out["mask_input"] > 0].tolist() == trained_on, "another prompt"
        assert out.get("image_at") == place
    assert strings[-1], "predict needs predict_pp"


@pytest.mark.parametrize("name", NAMES)
def test_every_set_that_is_asked_has_its_evaluation_loss(name):
    evals = get_config(name).evals
    # 002's questions are asked a second time, scored with their options.
    asked = {k: s for k, s in evals.items() if s.type != "perplexity" and not k.endswith("_choices")}
    losses = {k: s for k, s in evals.items() if s.type == "perplexity"}
    assert asked and {*losses} == {f"{k}_loss" for k in asked}
    for k, section in asked.items():
        assert evals[f"{k}_loss"].data == section.data and "question_id" in evals[f"{k}_loss"].pp_fn


def test_stage1_trains_the_projection_head_alone():
    c = get_config("stage1_slake")
    setup = TrainingSetup.without_data(c)
    assert sum(x.size for x in setup.abstract.values()) == 2_924_220_144
    names, dtypes = setup.trained_names, setup.dtypes
    assert sorted(names) == ["img/head/bias", "img/head/kernel"]
    assert {str(d) for n, d in dtypes.items() if n not in names} == {"bfloat16"}
    assert {str(dtypes[n]) for n in names} == {"float32"}
    table = describe.parameters(setup)
    assert "2,361,344 parameters trained" in table
    assert "2,921,858,800 parameters frozen" in table
    line = next(s for s in table.splitlines() if s.startswith("img/head/kernel"))
    assert line.split()[1:5] == ["1152×2048", "float32", "trained", "img/head/.*"]
    assert line.split()[5:] == ["-,data", f"{1152 * 2048 * 4 // 8:,}", "B"]
    assert c.input.batch_size == 96 and c.grad_accum_steps == 16
    assert (c.lr, c.wd, c.total_epochs, c.label_smoothing) == (1e-5, 0, 5, 0)
    small = get_config("stage1_slake", "res=224")
    abstract = experiment.abstract_params(small, experiment.make_model(small))
    assert sum(x.size for x in abstract.values()) == 2_923_335_408


def shapes_of(c):
    return experiment.abstract_params(c, experiment.make_model(c))


@pytest.mark.parametrize("name", STAGE2)
def test_stage2_trains_adapters_in_attention_of_both_towers_alone(name):
    c = get_config(name, "stage1=/runs/stage1")
    assert c.model_init == "/runs/stage1"
    setup = TrainingSetup.without_data(c)
    names, dtypes = setup.trained_names, setup.dtypes
    assert sum(setup.abstract[n].size for n in names) == 3_833_856
    assert all(n.endswith(("lora_a", "lora_b")) for n in names)
    assert {n.split("/")[0] for n in names} == {"img", "llm"}
    assert {str(d) for n, d in dtypes.items() if n not in names} == {"bfloat16"}
    assert {str(dtypes[n]) for n in names} == {"float32"}
    specs = set(experiment.adapted(c, experiment.make_model(c)).values())
    assert specs == {lora.Spec(rank=8, alpha=32.0, dropout=0.05)}
    assert c.input.batch_size == 96 and c.grad_accum_steps == 16
    assert (c.lr, c.wd, c.label_smoothing) == (1e-5, 0, 0)
    assert c.schedule[0][1] == dict(decay_type="constant")


@pytest.mark.parametrize(
    "arg, count",
    [
        ("lora=script", 11_298_816),
        ("lora=draft,rank=12", 12_966_912),
        ("lora=figure,rank=12", 21_268_608),
        ("lora=llm", 1_843_200),
        ("rank=12", 5_750_784),
        ("res=224,prompt=bare,norm=token,micro=1,accum=4", 3_833_856),
    ],
)
def test_variants_of_stage2(arg, count):
    c = get_config("stage2_medpix2", arg)
    abstract = shapes_of(c)
    assert sum(abstract[n].size for n in optim.trained_names(c, list(abstract))) == count
    if "bare" in arg:
        assert "'answer {question}'" in c.input.pp and c.evals.medpix2_validate.pp_fn.count("bare") == 0
        assert c.res == 224 and c.loss_norm == "token" and c.input.batch_size == 4


def test_stage2_without_stage1_is_the_ablation():
    assert get_config("stage2_rocov2", "init=/w/mix_448.npz").model_init == "/w/mix_448.npz"
    with pytest.raises(ValueError, match="not both"):
        get_config("stage2_rocov2", "init=/w/mix_448.npz,stage1=/runs/stage1")


@pytest.mark.parametrize("arg", ["lora=qv", "prompt=none", "medpix=1.5"])
def test_wrong_variants_of_stage2(arg):
    with pytest.raises(ValueError, match=f"{arg}|{arg.partition('=')[2]!r}.*expected"):
        get_config("stage2_rocov2_medpix2", arg)


def test_the_mixture_has_the_share_asked_for():
    c = get_config("stage2_rocov2_medpix2", "medpix=0.4,data_dir=/d")
    for key in ("rocov2", "medpix2"):
        assert c.input[key].data.to_dict() == dict(name=f"{key}/qa", split="train", data_dir="/d")
        assert c.evals[f"{key}_validate"].data.split == "validate"
    plain = get_config("stage2_rocov2_medpix2", "medpix=0.4,anneal=False")
    for config in (c, plain):
        phases = mixture.check_phases(dict(config.input.data), config.input.get("anneal"))
        which, _ = mixture.draw(phases, 3000)
        medpix = sorted(config.input.data).index("medpix2")
        assert abs(np.mean(which == medpix) - 0.4) < 1e-3, "the share of MedPix over the whole of training"
    assert [p["medpix2"] for _, p in mixture.check_phases(dict(c.input.data), c.input.anneal)] == (
        pytest.approx([0, 0.4, 0.8])
    )
    assert "anneal" not in plain.input


@pytest.mark.parametrize("name", ["stage2_rocov2", "stage2_rocov2_medpix2"])
def test_roco_v1_in_place_of_v2(name):
    def roco(c):
        return (c.input.get("rocov2") or c.input).data.name

    assert roco(get_config(name)) == "rocov2/qa"
    c = get_config(name, "version=v1")
    assert roco(c) == c.evals.rocov2_validate.data.name == "roco_v1/qa"
    with pytest.raises(ValueError, match="version='v3': expected one of"):
        get_config(name, "version=v3")


@pytest.mark.parametrize("name", STAGE2)
def test_stage2_of_the_tiny_base_starts_from_its_weights(name):
    c = get_config(name, "tiny")
    found = flatten_tree(checkpoints.load_params(c.model_init))
    abstract = shapes_of(c)
    trained = optim.trained_names(c, list(abstract))
    assert trained and set(abstract) - set(trained) == set(found)
    assert all(abstract[n].shape == x.shape for n, x in found.items())
    assert get_config(name, "tiny,stage1=/runs/stage1").model_init == "/runs/stage1"


@pytest.mark.parametrize("name", ["stage2_medpix2", "stage2_rocov2"])
def test_letters_are_asked_for_where_wanted(name):
    plain, letters = get_config(name), get_config(name, "letters")
    pmc = get_config("stage2_pmc_vqa")
    for a, b in zip(letters.evals.values(), pmc.evals.values()):
        if a.type == b.type == "perplexity":
            assert "inkey='answer_letter'" in a.pp_fn
            continue
        assert (a.protocol, a.choices, a.options) == (b.protocol, b.choices, b.options)
    assert "{choice_d}" in letters.input.pp and "inkey='answer_letter'" in letters.input.pp
    assert letters.predict_pp == pmc.predict_pp.replace("192", "256")
    assert "choice" not in str(plain) and "answer_letter" not in str(plain)


def test_multiple_choice_shows_the_options_and_asks_for_the_letter():
    tok = get_tokenizer("tiny")
    for arg, expected in (("", "C"), ("answer=text", ANSWER)):
        c = get_config("stage2_pmc_vqa", arg)
        out = pp(c.input.pp)(row())
        said = tok.to_str(out["text"][out["mask_loss"] > 0].tolist())
        assert said == expected
        seen = tok.to_str(out["text"][out["mask_ar"] == 0].tolist())
        assert "A: option a B: option b C: option c D: option d" in seen
        section = c.evals.pmc_vqa_validate
        assert pp(section.pp_fn)(row())["answer"] == expected
        assert row()[section.get("train_answer", "answer")] == expected
        assert section.protocol == "multiple_choice"
        assert section.options == ("letter" if arg == "" else "text")
        assert {*section.choices, "answer_letter"} <= pp(section.pp_fn)(row()).keys()
    with pytest.raises(ValueError, match="expected one of"):
        get_config("stage2_pmc_vqa", "answer=number")
    c = get_config("stage2_pmc_vqa", "version=v2_open")
    out = pp(c.input.pp)(row())
    assert tok.to_str(out["text"][out["mask_loss"] > 0].tolist()) == ANSWER
    assert "option a" not in tok.to_str(out["text"][out["mask_ar"] == 0].tolist())
    assert c.evals.pmc_vqa_validate.protocol == "open"
    c = get_config("stage2_pmc_vqa", "samples=5")
    assert c.evals.pmc_vqa_validate.pred_kw.num_samples == 5
    assert c.evals.pmc_vqa_validate.pred_kw.temperature == 1.0


@pytest.mark.parametrize(
    "section, samples, keys",
    [
        (common.vqa_eval, 1, set()),
        (common.closed_eval, 5, set()),
        (common.open_eval, 1, set()),
        (common.multiple_choice_eval, 5, {*rows.CHOICES, rows.ANSWER_LETTER}),
    ],
)
def test_evaluations_by_protocol(section, samples, keys):
    """What a section says, the evaluator takes; what it keeps is there."""
    c = ConfigDict(dict(res=32, tokenizer="tiny"))
    made = section(c, "x", "test", text_len=40, max_new_tokens=4)
    opened = ("type", "data", "train_data", "train_answer", "pp_fn", "batch_size")
    given = {k: v for k, v in made.items() if k not in opened}
    vqa.Evaluator(None, "tiny", inputs=[], train_data=[], **given)
    kw = made["pred_kw"]
    assert (kw["num_samples"], kw["temperature"]) == (samples, float(samples > 1))
    out = pp(made["pp_fn"])(row(modality="CT"))
    assert {*vqa.NEEDED, "image_id", "modality", *keys} <= out.keys()
    assert section(c, "x", "test", text_len=40, max_new_tokens=4, samples=3, temperature=0.2)["pred_kw"] == dict(
        max_new_tokens=4, num_samples=3, temperature=0.2
    )


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
        config_values.checked(c)


# --- One file is one experiment, and the prompt is written once ---


def texts_of(path):
    """The string constants of a file, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    return [
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs and str(n.value) == n.value
    ]


def test_the_words_of_the_prompt_stand_in_one_file():
    files = {p.stem for p in FOLDER.glob("*.py") if any("{question}" in t or "answer en" in t for t in texts_of(p))}
    assert files == {"common"}
    others = {p.stem for p in FOLDER.glob("*.py") if any("{asked}" in t or "{said}" in t for t in texts_of(p))}
    assert others == {"common_prompts"}
    assert common.prompt_for() == common.PROMPT == "answer en {question}"
    assert common.prompt_for("") == "answer {question}"
    assert common.prompt_for("zh", options=True).startswith("answer zh {question} A: {choice_a} B: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_plain_assignments_and_imports_no_experiment(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    assert not any(isinstance(n, ast.Lambda) for n in ast.walk(tree))
    imported = {
        a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "configs" for a in n.names
    }
    assert imported <= {"common", "common_3b", "common_boxes", "common_prompts", "common_systems", "tiny_base"}


# --- The prompt in a row ---


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


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_can_change_every_value(name):
    """ml_collections takes no value for a plain None, and no 0.5 where a 1 stands."""
    config = get_config(name)

    def check(section, where):
        for key in section:
            path = f"{where}.{key}"
            assert section.get_type(key) is not type(None), f"{path} is None: write common.path_or_none"
            if key.endswith(("_epochs", "_percent")) or key in ("lr", "wd", "label_smoothing", "grad_clip_norm"):
                assert section.get_type(key) is float, f"{path} is {section[key]!r}: write it as a float"
            if isinstance(section[key], ConfigDict):
                check(section[key], path)

    check(config, "config")
