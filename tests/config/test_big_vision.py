"""Configs in big_vision's words train here; what isn't here is refused with what to use instead.

The first file is written by the test, in the grammar of big_vision's transfer configs. With
BIG_VISION_DIR set to a checkout, the real ones are read too.
"""

import json
import os
import pathlib
import subprocess
import sys

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from paligemma_med import train
from paligemma_med.config import big_vision, stand_ins
from paligemma_med.config import values as config_values
from tests import environ, tiny

CONFIG = '''
"""An experiment as big_vision writes it."""
import big_vision.configs.common as bvcc
from big_vision.configs.proj.paligemma.transfers import common
from big_vision.configs.proj.paligemma.transfers.common import TOKENIZER, combine_and_keep_eval, combine_and_keep_train


def tiny(pp):
    return pp.replace(repr(TOKENIZER), "'tiny'")


def get_config(arg=None):
    c = bvcc.parse_arg(arg, res=32, mode="xm", final_split=False, text=40, data_dir="")
    image = f"decode|resize({c.res}, antialias=True)|value_range(-1, 1)"
    prompt = 'strfmt("answer en {question}", outkey="prefix")'
    c.input = bvcc.parse_arg("")
    c.input.data = dict(name="phantom", split="train", data_dir=c.data_dir)
    c.input.pp = tiny("|".join([image, prompt, 'copy("answer", "suffix")', combine_and_keep_train(c.text)]))
    c.input.batch_size = 16
    c.input.shuffle_buffer_size = 1000
    c.input.cache_raw = True
    c.total_steps = 2
    c.optax_name = "scale_by_adam"
    c.lr = 1e-3
    c.wd = 3e-7
    c.grad_clip_norm = 1.0
    c.label_smoothing = 0.0
    schedule = dict(decay_type="cosine", warmup_percent=0.5)
    c.schedule = [("img/.*", schedule), ("llm/.*", schedule)]
    c.evals = {}
    for name, kind in (("val/mini", "transfers.vqa"), ("val/mini/pplx", "perplexity")):
        c.evals[name] = dict(
            type=f"proj.paligemma.{kind}", pred="decode", pred_kw={"max_decode_len": 4}, log_percent=0.5,
            data={**c.input.data, "split": "validate"}, tokenizer="tiny", skip_first=True,
            pp_fn=tiny("|".join([image, prompt, combine_and_keep_eval(c.text, keep=("question_id", "answer"))])),
        )
    c.model_name = "proj.paligemma.paligemma"
    c.model = {}
    c.model.img = dict(variant="mu/16", pool_type="none", scan=True, posemb="learn", dtype_mm="float32")
    c.model.llm = dict(variant="gemma_mu", depth=1, dropout=0.0)
    c.mesh = [("data", -1)]
    c.sharding_strategy = [("params/img/.*", "replicate"), ("opt/.*", "replicate"), (".*", 'fsdp(axis="data")')]
    c.sharding_rules = [("act_batch", ("data",))]
    c.log_training_steps = 1
    c.ckpt_steps = 1000
    c.pp_modules = ["ops_general", "ops_image", "ops_text", "proj.paligemma.ops"]
    c.seed = 0
    return c
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs") / "transfer.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(autouse=True)
def _no_gemma_dir(monkeypatch):
    monkeypatch.delenv("BV_GEMMA_DIR", raising=False)


def read(path, arg="", *more):
    """The config that --config=path:arg and further flags give."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    argv = ["program", f"--config={path}:{arg}", *more]
    with pytest.MonkeyPatch.context() as patch, stand_ins.importable(path):
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for --config.key=…
        values(argv)
    return values.config


def changed(file, **kw):
    c = read(file)
    with c.unlocked():
        for key, value in kw.items():
            c[key] = value
    return c


# --- A run ---


def test_a_config_of_its_grammar_trains_and_goes_on(file, tiny_data, tmp_path, capsys):
    workdir = str(tmp_path / "w")
    c = read(file, f"data_dir={tiny_data}", "--config.lr=0.002")
    assert train.train(c, workdir) == {}
    err = capsys.readouterr().err
    assert "Not read here, arguments of big_vision's file most likely: config.data_dir, config.final_split" in err
    assert "config.evals.val/mini is big_vision's own: left out." in err
    assert "config.evals.val/mini/pplx is big_vision's own: left out." in err
    ran = json.loads((tmp_path / "w" / "config.json").read_text())
    assert (ran["text_len"], ran["tokenizer"], ran["lr"]) == (40, "tiny", 0.002)
    assert set(ran) <= config_values.KEYS and ran["input"]["allow_missing_eos"] is True
    rows = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2]

    train.train(read(file, f"data_dir={tiny_data}", "--config.lr=0.002", "--config.total_steps=3"), workdir)
    assert "Resumed from step 2 of 3" in capsys.readouterr().out


def test_what_becomes_of_its_keys(file):
    c = changed(file, prefetch_to_device=2, model_init="/w/x.npz", schedule=dict(decay_type="stair", warmup_steps=3))
    with c.unlocked():
        c.input.skip_errors = True
        del c.evals
    c = config_values.checked(c)
    assert c.input.prefetch == 2 and c.input.on_error == "skip"
    assert c.sharding_strategy == [("img/.*", "replicate"), (".*", 'fsdp(axis="data")')]
    assert c.schedule.to_dict() == dict(decay_type="constant", warmup_steps=3)
    assert c.model.img.to_dict() == dict(variant="mu/16", pool_type="none", scan=True, dtype="float32")
    assert c.model_init == "/w/x.npz"
    before = c.to_json_best_effort()
    c = config_values.checked(c)
    assert c.to_json_best_effort() == before, "an adopted config is one of ours"


def test_length_and_tokenizer_come_from_the_pp_of_a_mixture(file):
    c = changed(file)
    with c.unlocked():
        pp = c.input.pp.replace("41", "25")
        del c.input.pp
        del c.input.data
        c.input.data = dict(a=1, b=2)
        c.input.a = dict(data=dict(name="phantom", split="train"), pp=pp)
        c.input.b = dict(data=dict(name="phantom", split="train"), pp=pp)
    c = config_values.checked(c)
    assert (c.text_len, c.tokenizer) == (24, "tiny")
    c = changed(file, text_len=17, tokenizer="other")
    c = config_values.checked(c)
    assert (c.text_len, c.tokenizer) == (17, "other"), "what is said counts"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("pt_224", "pt_224.npz"),
        ("pt_448.bf16", "pt_448.bf16.npz"),
        ("pt_3b_224", "pt_3b_224.bf16.npz"),
        ("pt_10b_896.bf16", "pt_10b_896.bf16.npz"),
    ],
)
def test_short_names_of_weights(file, name, expected, monkeypatch):
    c = changed(file, model_init=name)
    big_vision.adopt(c, config_values.KEYS)
    assert c.model_init == f"$BV_GEMMA_DIR/{expected}", "an error at loading says what to set"
    monkeypatch.setenv("BV_GEMMA_DIR", "/ckpts")
    c = changed(file, model_init=name)
    big_vision.adopt(c, config_values.KEYS)
    assert c.model_init == f"/ckpts/{expected}"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(model_name="vit"), "config.model_name is 'vit'; expected 'proj.paligemma.paligemma'"),
        (dict(pp_modules=["ops_text", "proj.x.ops"]), "pp_modules names 'proj.x.ops', whose ops aren't here"),
        (dict(model_load=dict(img_load_kw={"dont_load": ["a"]})), "config.model_load is .*: .*model_init"),
        (dict(resume="/a/b"), "config.resume is of big_vision's trainer alone: a run resumes in its own --workdir"),
        (dict(keep_ckpt_steps=100), "config.keep_ckpt_steps is .* config.keep_ckpt says"),
        (dict(grad_clip_per_example=1.0), "config.grad_clip_per_example is .* config.grad_clip_norm"),
        (dict(optax_nam="x"), r"unknown keys \['optax_nam'\] \(did you mean 'optax_name'"),
        (dict(schedule=dict(decay_type="rsqrt")), "decay_type is 'rsqrt'"),
    ],
)
def test_what_is_not_here_is_refused(file, change, sentence, tiny_data, tmp_path):
    c = changed(file, **change)
    with c.unlocked():
        c.input.data.data_dir = str(tiny_data)
    with pytest.raises(ValueError, match=sentence):
        train.train(c, str(tmp_path / "w"))


def test_its_reader_of_json_lines_downloads_nothing(file, tmp_path):
    c = changed(file)
    with c.unlocked():
        del c.input.data
        c.input.data = dict(name="bv:jsonl", fname="gs://b/x.jsonl", fopen_keys=dict(image="gs://b/"))
    with pytest.raises(ValueError, match="gs://b/x.jsonl is not on this machine"):
        train.train(c, str(tmp_path / "w"))


def test_a_config_of_ours_stays_as_it_is():
    c = tiny.config("/no/data")
    c.mode = "xm"
    before = c.to_json_best_effort()
    assert big_vision.adopt(c, config_values.KEYS) == [] and c.to_json_best_effort() == before
    with pytest.raises(ValueError, match=r"unknown keys \['mode'\]"):
        config_values.checked(c)


# --- Command lines ---


def run(*argv):
    env = {k: v for k, v in environ.of_program(1).items() if k != "BIG_VISION_DIR"}
    return subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, env=env, timeout=900)


@pytest.mark.slow
def test_dry_run_by_command_line(file):
    done = run("paligemma_med.train", f"--config={file}:text=24", "--dry_run", "--config.input.batch_size=4")
    assert done.returncode == 0, done.stderr
    assert "Compiled in" in done.stdout and "peak" in done.stdout
    done = run("paligemma_med.train", "--config", f"{file}:rse=3", "--dry_run")
    assert done.returncode and done.stderr.strip().endswith(
        "known are ['data_dir', 'final_split', 'mode', 'res', 'text']."
    )
    file.with_name("other.py").write_text("import big_vision.utils\n")
    done = run("paligemma_med.train", f"--config={file.with_name('other.py')}", "--dry_run")
    assert done.stderr.startswith("error: big_vision.utils isn't here: set BIG_VISION_DIR")
    file.with_name("other.py").write_text("from big_vision.configs.common import format_str\n")
    done = run("paligemma_med.train", f"--config={file.with_name('other.py')}", "--dry_run")
    assert done.stderr.startswith("error: big_vision.configs.common has no 'format_str' here: set BIG_VISION_DIR")


# --- The real files ---

CHECKOUT = pathlib.Path(os.environ.get("BIG_VISION_DIR") or "/nowhere").expanduser()
TRANSFERS = CHECKOUT / "big_vision" / "configs" / "proj" / "paligemma" / "transfers"
real = pytest.mark.skipif(not TRANSFERS.is_dir(), reason="BIG_VISION_DIR is no checkout of big_vision")
# What of them isn't here: preprocessing of their own, and readers that they leave to the user.
NOT_HERE = {
    **dict.fromkeys(["nlvr2", "refcoco_seg", "science_qa", "widgetcap"], "whose ops aren't here"),
    "pope": "total_steps is 0",
}


@real
@pytest.mark.parametrize("path", sorted(p for p in TRANSFERS.glob("*.py") if p.stem != "common"), ids=lambda p: p.stem)
def test_real_transfer_configs(path, tmp_path, monkeypatch):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    try:
        theirs = read(path)
    except Exception as e:
        assert "Please implement a video reader of choice" in str(e)
        return
    monkeypatch.delenv("BIG_VISION_DIR")
    assert read(copy).to_json_best_effort() == theirs.to_json_best_effort(), "as with our stand-ins"
    if path.stem in NOT_HERE:
        with pytest.raises(ValueError, match=NOT_HERE[path.stem]):
            config_values.checked(theirs)
        return
    theirs = config_values.checked(theirs)
    assert isinstance(theirs, ml_collections.ConfigDict) and set(theirs) <= config_values.KEYS


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqav2", "forkme", "forkme.py:size="])
def test_dry_run_of_the_real_files(name):
    """PaliGemma-3B, and PaliGemma 2 3B in between: the step compiles for them as they are."""
    done = run("paligemma_med.train", f"--config={TRANSFERS}/{name if ':' in name else name + '.py'}", "--dry_run")
    assert done.returncode == 0, done.stderr
    parameters = {"vqav2": "2,923,335,408", "forkme": "3,032,094,960"}.get(name, "2,923,335,408")
    assert f"{parameters} parameters trained" in done.stdout and "Compiled in" in done.stdout
