"""Mistakes in a config: each is told in one sentence, in seconds, before weights are read.

The table has the change that makes the mistake and words of the sentence: the key, what was found,
what to change.
"""

import re
import time

import numpy as np
import pytest

from paligemma_med import experiment, train, weights
from paligemma_med.checkpoints import npz
from paligemma_med.models.leaves import unflatten_tree
from tests import tiny

CONSTANT = dict(decay_type="constant")


class WeightsRead(Exception):
    """A mistake was found too late."""


@pytest.fixture(scope="module", autouse=True)
def _no_weights():
    def read(*args, **kw):
        raise WeightsRead

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "place_params", read)
        patch.setattr(weights, "_random_params", read)
        yield


@pytest.fixture(scope="module")
def weights_files(tmp_path_factory):
    """Path of weights of the tiny model, and of another with a larger vocabulary."""
    c, out = tiny.config(), []
    for vocab_size in (1024, 1152):
        with c.unlocked():
            c.model.llm.vocab_size = vocab_size
        shapes = experiment.abstract_params(c, experiment.make_model(c))
        tree = {n: np.zeros(x.shape, np.float32) for n, x in shapes.items()}
        out.append(str(tmp_path_factory.mktemp("w") / f"{vocab_size}.npz"))
        npz.save_npz(out[-1], unflatten_tree(tree))
    return out


def change(config, path, value, found=None):
    """Sets config.<path>; `found`, a part of the text that is there, is replaced by `value`."""
    *folders, key = path.split(".")
    for folder in folders:
        config = config[folder]
    if found is not None:
        assert found in config[key]
        value = config[key].replace(found, value)
    with config.unlocked():
        if key in config:
            del config[key]  # a dict would be merged into the one there is
        if value is not ...:
            config[key] = value


def told(config, folder):
    """The sentence that `train` ends with."""
    started = time.process_time()
    with pytest.raises((ValueError, OSError)) as error:
        train.train(config, folder)
    assert time.process_time() - started < 5
    return str(error.value)


PP, EVAL = "input.pp", "evals.val.pp_fn"
MISTAKES = [
    # Keys
    (("optax_nam", "x"), r"config has unknown keys \['optax_nam'\] \(did you mean 'optax_name'"),
    (("input.batchsize", 3), "input: unknown keys .*'batchsize'"),
    (("input.data.nme", "x"), "input data .*unknown: .*'nme'"),
    (("evals.val.log_stepz", 3), "config.evals.val has unknown keys.*did you mean 'log_steps'"),
    (("evals.val.pred_kw", dict(max_new_token=4)), "evals.val.pred_kw has unknown.*max_new_tokens"),
    (("model.img.widht", 3), "config.model.img has unknown keys.*did you mean 'width'"),
    (("model.llm.dept", 3), "config.model.llm has unknown keys.*did you mean 'depth'"),
    (("model.image_ar", "both"), "config.model.image_ar is 'both'; expected 'prefix' or 'block' or"),
    (("model.connector", dict(kind="brigde")), "connector.kind is 'brigde'; expected one of"),
    (("model.img_model", "resnet"), "config.model.img_model is 'resnet'; expected one of 'vit'"),
    (("model.llm_model", "gpt"), "config.model.llm_model is 'gpt'; expected one of 'proj.paligemma.gemma_bv'"),
    (("model.imgs", {}), "config.model has unknown keys.*did you mean 'img'"),
    (("schedule", dict(decay_typ="cosine")), "config.schedule: unknown keys .*'decay_typ'"),
    (("optax", dict(beta1=0.9)), "'scale_by_adam' doesn't take config.optax .*beta1"),
    (("lora", [("llm/layers/.*", dict(rnk=4))]), "lora: .*'rnk'.*expected .*'rank'"),
    (("input", ...), r"config lacks \['input'\]"),
    (("input.batch_size", ...), r"config.input lacks \['batch_size'\]"),
    (("input.data", ...), r"config.input lacks \['data'\]"),
    (("input.pp", ...), "input: 'pp' is missing"),
    (("evals.val.type", ...), r"config.evals.val lacks \['type'\]"),
    (("evals.val", 3), "config.evals.val is 3; expected a dict"),
    (("total_steps", ...), "says nothing about total_steps"),
    # Values
    (("res", "32"), "config.res is '32'; expected a whole number"),
    (("res", 33), "Image is 33×33 px, which patches of 16×16 px don't tile"),
    (("dtype", "bf16"), "config.dtype is 'bf16'; expected a type like"),
    (("frozen_dtype", "bf16"), "config.frozen_dtype is 'bf16'"),
    (("frozen_dtype", "int4"), "is 'int4'; expected a type .* or one of 'int8' and 'nf4'"),
    (("attn_impl", "flash"), "config.attn_impl is 'flash'; expected 'xla' or 'cudnn'"),
    (("attn_impl", "cudnn"), "'cudnn', which needs an NVIDIA GPU.*set it to 'xla'"),
    (("model.llm.width", "64"), "config.model.llm.width is '64'; expected a whole number"),
    (("model.llm.variant", "gemma_3b"), "variant 'gemma_3b' is unknown; expected one of"),
    (("model.img.remat_policy", "all"), "remat_policy is 'all'; expected 'none' or"),
    (("model.img.num_classes", 3), "config.model can't be built: .*concat"),
    (("lr", "1e-3"), "config.lr is '1e-3'; expected a number"),
    (("grad_clip_norm", 0), "config.grad_clip_norm is 0; expected a number above 0"),
    (("loss_norm", "tokens"), "config.loss_norm is 'tokens'; expected 'example' or 'token'"),
    (("label_smoothing", 1), "config.label_smoothing is 1; expected a number from 0"),
    (("skip_nonfinite", -1), "config.skip_nonfinite is -1; expected a whole number, 0 or more"),
    (("tensorboard", "yes"), "config.tensorboard is 'yes'; expected True or False"),
    (("keep_best", "val/acc"), r"keep_best is 'val/acc'; expected dict\(metric='NAME/METRIC'"),
    (("supervised_len", 0), "config.supervised_len is 0; expected a whole number"),
    (("loss_chunk", 0), "config.loss_chunk is 0; expected a whole number, 1 or more"),
    (("seed", -1), "config.seed is -1; expected a whole number"),
    (("total_steps", 0), "config.total_steps is 0; expected a number above 0"),
    (("total_epochs", 2), "Only one of .*'total_steps', 'total_epochs'"),
    (("ckpt_steps", -1), "ckpt_steps is -1; expected a number, zero or more"),
    (("evals.val.log_steps", "x"), "config.evals.val: log_steps is 'x'"),
    (("evals.val.type", "vq"), "config.evals.val.type is 'vq'; expected one of"),
    (("evals.val.train_answer", "anser"), "val: train_answer='anser'.* only .'answer'"),
    (("evals.val.pred_kw.max_new_tokens", 0), "max_new_tokens is 0; expected a whole number"),
    (("input.num_workers", "4"), "num_workers='4': expected a whole number"),
    (("optax_name", "adamm"), "optax_name is 'adamm'; expected a transformation in optax"),
    (("optax", dict(b1="0.9")), "optax.scale_by_adam can't take a step with config.optax"),
    (("schedule", dict(decay_type="cosin")), "decay_type is 'cosin'; expected 'constant'"),
    (("schedule", "cosine"), r"config.schedule is 'cosine'; expected dict\(decay_type=…\)"),
    (
        ("schedule", [("img/head/.*", CONSTANT, 3)]),
        r"config.schedule is .*expected .* a list of \(regex, dict or None\) p",
    ),
    (("lr_mults", {"img": 2}), r"config.lr_mults is \{'img': 2\}; expected a list of \(regex, number\) pairs"),
    (("lr_mults", [(".*", "2")]), r"config.lr_mults is .*'2'.*; expected a list of \(regex, number\) pairs"),
    # Regular expressions that match nothing, or aren't any
    (("schedule", [("img/hed/.*", CONSTANT), (".*", None)]), "config.schedule: 'img/hed/.*' match"),
    (("schedule", [("img/head/(", CONSTANT)]), r"'img/head/\(' is not a regular expression"),
    (
        ("schedule", [("img/head/.*", CONSTANT)]),
        r"says nothing about 30 .*end it with \('.\*', Non",
    ),
    (("lr_mults", [("img/hed/.*", 2.0)]), "config.lr_mults: 'img/hed/.*' matches no parameter"),
    (("wd_mults", [("img/hed/.*", 2.0)]), "config.wd_mults: 'img/hed/.*' matches no parameter"),
    (("lora", [("llm/layer/.*", dict(rank=4))]), "lora: 'llm/layer/.*' matches nothing"),
    (("sharding_strategy", [("img/hed/.*", "replicate"), (".*", "replicate")]), "'img/hed/.*' mat"),
    # Devices
    (("mesh", "data"), r"config.mesh is 'data'; expected a list of \(axis, size\) pairs"),
    (("mesh", [("batch", -1)]), "'data' is not in the mesh"),
    (("mesh", [("data", 3)]), "multiply to 3, which doesn't fit the 8 devices"),
    (("sharding_strategy", [(".*", 'fsdp(axis="modl")')]), "axis 'modl' is not in the mesh"),
    (("sharding_strategy", [(".*", "fspd")]), "'fspd' is not known"),
    (("sharding_rules", [("act_btch", "data")]), "no 'act_btch', expected one of"),
    (("input.batch_size", 12), "batch_size = 12 doesn't divide into 8 devices .*; 16 does"),
    (("grad_accum_steps", 3), "batch_size = 16 doesn't divide by config.grad_accum_steps = 3"),
    (("grad_accum_steps", 4), "doesn't divide into 4 microbatches .* on 8 devices .*; 32 does"),
    (("evals.val.batch_size", 12), "config.evals.val: batch_size=12 doesn't divide .*use 8 or 16"),
    # Data
    (("input.data.split", "trian"), r"no split 'trian'; it has train \(116 examples\)"),
    (("input.data.name", "phantm"), "'phantm' is not built in .*data_prep.build phantm"),
    (("input.data", "phantom"), "config.input.data is 'phantom'; expected a dict"),
    (("evals.val.data.split", "val"), "config.evals.val: .* no split 'val'; it has"),
    (("evals.val.data.name", "phantm"), "config.evals.val: .*not built in .*data_prep.build"),
    (("evals.val.train_data.split", "trai"), "config.evals.val: .*no split 'trai'"),
    # Preprocessing
    ((PP, "value_rang", "value_range"), "config.input, pp: unknown pp op 'value_rang'; did you"),
    ((PP, "antialas", "antialias"), r"resize\(32, antialas=True\).*its arguments are resize"),
    ((PP, "anwser", "answer"), "there is no key 'anwser'; the example has"),
    ((PP, "", ", eos='yes'"), "no supervised EOS .*add eos='yes'"),
    ((PP, "tolen(5", "tolen(41"), "no supervised EOS .*raise text_len"),
    ((PP, "tolen(40", "tolen(41"), "text of length 40, but config.text_len = 40 asks for 41"),
    ((PP, "resize(48", "resize(32"), r"shape \(48, 48, 3\), but config.res = 32 .*resize\(32\)"),
    ((PP, "'text', 'mask_loss')", "'text', 'mask_ar', 'mask_loss')"), "leaves no 'mask_ar'"),
    ((EVAL, "resiz", "resize"), "config.evals.val: unknown pp op 'resiz'; did you mean resize"),
    ((EVAL, "{qestion}", "{question}"), "config.evals.val.pp_fn on record 0 .*no key 'qestion'"),
    ((EVAL, "resize(48", "resize(32"), "config.evals.val.pp_fn gives images of shape .48, 48, 3"),
    ((EVAL, "", "'mask_input', "), r"config.evals.val.pp_fn leaves no 'mask_input'.*keep\("),
    ((EVAL, "", "'answer_type', "), r"config.evals.val.pp_fn leaves no 'answer_type'.*keep\("),
    (("predict_pp", "decod"), "config.predict_pp: unknown pp op 'decod'; did you mean decode"),
    # Files
    (("tokenizer", "tinny"), "unknown tokenizer 'tinny'; known: tiny, tiny"),
    (("tokenizer", 'gemma(model="/no/such.model")'), "there is no tokenizer file '/no/such.model'"),
    (("model.llm.vocab_size", 512), "has 1024 tokens, but the model only 512 rows: set config.mod"),
    (("model_init", "/no/such.npz"), "no weights file /no/such.npz"),
    (("model_init", "/no/such"), "no weights at /no/such: expected a big_vision file"),
    (("model_init", dict(img="/x.npz")), r"model_init has the keys \['img'\]: expected a path"),
    (("adapter_init", "/no/such"), "adapter_config.json is missing: expected a PEFT"),
]


@pytest.mark.parametrize("mistake, sentence", MISTAKES, ids=lambda x: str(x)[:60])
def test_mistakes(mistake, sentence, tiny_data, tmp_path):
    c = tiny.config(tiny_data)
    change(c, *mistake)
    message = told(c, str(tmp_path / "w"))
    assert re.search(sentence, message), message
    assert len(message.splitlines()) == 1


def test_a_single_question_has_no_other_image(tiny_data, tmp_path):
    """Told before training, not by the evaluation at its end."""
    c = tiny.config(tiny_data)
    c.evals.val.data.split = "validate[:1]"
    c.evals.val.controls = ("echo", "shuffled_images")
    message = told(c, str(tmp_path / "w"))
    assert "config.evals.val: there is one question in" in message and len(message.splitlines()) == 1
    c.evals.val.controls = ("echo",)
    with pytest.raises(WeightsRead):
        train.train(c, str(tmp_path / "w"))


def test_the_config_without_mistakes_gets_to_its_weights(tiny_data, tmp_path):
    with pytest.raises(WeightsRead):
        train.train(tiny.config(tiny_data), str(tmp_path))


def test_weights_of_another_resolution(weights_files, tiny_data, tmp_path):
    c = tiny.config(tiny_data, model_init=weights_files[0], res=64)
    for key in (PP, EVAL):
        change(c, key, "resize(64", "resize(32")
    message = told(c, str(tmp_path))
    for words in ("1024.npz was made for images of 32 px", "config.res = 64", "resize(32)"):
        assert words in message
    c.resample_posemb = True
    with pytest.raises(WeightsRead):
        train.train(c, str(tmp_path))


def test_weights_of_another_model(weights_files, tiny_data, tmp_path):
    message = told(tiny.config(tiny_data, model_init=weights_files[1]), str(tmp_path))
    assert "input_embedding: expected (1024, 64), found (1152, 64)" in message


def test_images_are_of_the_size_that_the_config_says(tiny_data, tmp_path):
    message = told(tiny.config(tiny_data, res=48), str(tmp_path))
    assert "input.pp of phantom gives images of shape (32, 32, 3), but config.res = 48" in message


def test_tokens_of_another_tokenizer(tiny_data, tmp_path, monkeypatch):
    """A pp string that names another tokenizer than the config's would read rows that aren't."""
    from paligemma_med.pp import tokenizer

    usual = tokenizer._tiny()

    class Larger:
        vocab_size, pad_token, eos_token, bos_token = 5000, 0, 1, 2

        def to_int(self, text, **kw):
            return [4000, *usual.to_int(text, **kw)]

    monkeypatch.setattr(tokenizer, "_gemma", lambda *args: Larger())
    c = tiny.config(tiny_data)
    change(c, PP, 'gemma(model="x")', "tiny")
    assert "token 4000, but the model has 1024 rows" in told(c, str(tmp_path))
