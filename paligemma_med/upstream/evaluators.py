"""This project's evaluators inside big_vision's training loop: evals[name].type = "paligemma_med".

What they ask, how they score and what they write are those of `paligemma_med.evaluators`. What they
read comes through big_vision: its data sources, its pp ops in TensorFlow, its batches. So they need
the tfrecord build alone, and see what the rest of its run sees. Images may therefore differ in
their last bits from those that `paligemma_med.evaluate` makes of the same rows (docs/big_vision.md
says by how much).

Made from what `upstream.config.translate` leaves of a section of config.evals. Files go where
training here puts them: <workdir>/eval/<name>/.
"""

import functools
import hashlib
import importlib
import json
import os
import shlex
import sys

import big_vision.input_pipeline as bv_input
import big_vision.utils as u
import jax
import numpy as np
import tensorflow as tf
from absl import flags
from big_vision.datasets import core as ds_core
from big_vision.pp import builder as pp_builder

import paligemma_med
from paligemma_med import config_values, experiment
from paligemma_med.checkpoints import fingerprint, npz

API = "jit"  # which big_vision asks each evaluator for
KINDS = ("vqa", "dialogue")
_ARRAYS = ("image", "text", "mask_ar", "mask_input", "_mask")


class Evaluator:
    """One of `paligemma_med.evaluators`, as big_vision's loop wants it."""

    def __init__(self, predict_fn, *, section, name, tokenizer, devices, batch_size=None):
        """Arguments as `big_vision.evaluators.common.from_config` gives them.

        Args:
          predict_fn: any of big_vision's predict_fns; only the model is taken from it.
          section: our section of config.evals, a dict.
          name: its name, for <workdir>/eval/<name>/.
          tokenizer: that of the model, a spec as for `pp.tokenizer.get_tokenizer`.
          devices: in the order of the batches' rows.
          batch_size: the trainer's own, for sections that have none.

        Raises:
          ValueError: an evaluator that isn't there, what it needs and section lacks, or a run of
            several processes.
        """
        if jax.process_count() > 1:
            raise ValueError(
                f"config.evals.{name}: in big_vision's loop our evaluators run in one process, "
                f"found {jax.process_count()}: leave config.evals empty there, and evaluate its "
                "checkpoints with paligemma_med.evaluate."
            )
        about = dict(section)
        section = {k: v for k, v in section.items() if k not in config_values.WHEN}
        kind = section.pop("type")
        if kind not in KINDS:
            raise ValueError(
                f"config.evals.{name}.type is {kind!r}; expected one of {list(KINDS)}, or one of "
                "big_vision's own, such as 'proj.paligemma.transfers.vqa'."
            )
        size = section.pop("batch_size", None) or batch_size
        inputs = Input(section.pop("data"), section.pop("pp_fn"), size, devices)
        if train_data := section.pop("train_data", None):
            answer = section.pop("train_answer", "answer")
            section["train_data"] = _TrainingRows(train_data, answer)
        folder = flags.FLAGS.workdir
        module = importlib.import_module(f"paligemma_med.evaluators.{kind}")
        self._evaluator = module.Evaluator(
            model_of(predict_fn), tokenizer, inputs=inputs, total=len(inputs),
            outdir=os.path.join(folder, "eval", name) if folder else None,
            about=functools.partial(_about, about, inputs, folder), **section,
        )  # fmt: skip

    def run(self, train_state):
        """Yields (name, number) of each figure, as `evaluators.scoring` describes them."""
        # big_vision's trainer forbids transfers that aren't spelled out; ours are small.
        with jax.transfer_guard("allow"):
            metrics = self._evaluator.run(train_state["params"])
        yield from metrics.items()


def model_of(predict_fn):
    """The model that one of `predict_fns.get_all(model)` was made for; it may be wrapped in the
    partial that big_vision makes of pred_kw."""
    fn = getattr(predict_fn, "fn", predict_fn)
    return fn.keywords["model"]


class Input:
    """A split read by big_vision, as an iterable of (batch, rows) like `input_pipeline.EvalInput`.

    len(): number of questions. cut: tokens that each row of the latest batch lost to `tolen`.
    """

    def __init__(self, data, pp_fn, batch_size, devices):
        source = ds_core.get(**data)
        self.source, self.cut = source, []
        self._devices = devices
        self._data, self._steps = bv_input.make_for_inference(
            _in_order(source, data["name"]),
            preprocess_fn=_counting(pp_fn),
            batch_size=batch_size,
            num_ex_per_process=source.num_examples_per_process(),
        )

    def __len__(self):
        return self.source.total_examples

    def __iter__(self):
        batches = bv_input.start_global(self._data, self._devices, keep_on_cpu=_AllBut(_ARRAYS))
        for _, batch in zip(range(self._steps), batches):
            host = {k: batch.pop(k) for k in [*batch] if k not in _ARRAYS}
            mask = np.asarray(u.get_local_slice_from_fsarray(batch["_mask"]))
            valid = range(int(mask.sum()))
            self.cut = host["_cut"][: len(valid)].tolist()
            texts = {k: v for k, v in host.items() if not k.startswith("_") and _is_text(v)}
            yield batch, [{k: _plain(v[i]) for k, v in texts.items()} for i in valid]


def _in_order(source, name):
    """The split's examples in the order of its files, as other readers of TFDS give them; without
    being told, tf.data takes turns between files (blocks of 16 examples)."""
    kw = {} if name.startswith("bv:") else {"interleave_cycle_length": 1}
    return source.get_tfdata(ordered=True, **kw)


def _counting(pp_fn):
    """The function of a pp string that adds "_cut": the tokens of "text" that the first `tolen`,
    and what follows it, leave out."""
    ops = pp_fn.split("|")  # as big_vision does
    first = next((i for i, op in enumerate(ops) if op.startswith("tolen(")), len(ops))
    before, after = (
        pp_builder.get_preprocess_fn("|".join(some), log_data=False)
        for some in (ops[:first], ops[first:])
    )

    def fn(data):
        data = before(data)
        length = tf.shape(data["text"])[0]
        data = after(data)
        return {**data, "_cut": tf.maximum(length - tf.shape(data["text"])[0], 0)}

    return fn


class _AllBut:
    """Says of every key but these that it stays on the host: the rows' texts, whatever they are."""

    def __init__(self, names):
        self._names = names

    def __contains__(self, name):
        return name not in self._names


def _is_text(values):
    """Whether these are texts, lists of them, or one number a row (other arrays aren't written)."""
    return values.dtype.kind in "OU" or values.ndim == 1


def _plain(value):
    """A row's value as `input_pipeline` would give it: str, a list of them, or a number."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


class _TrainingRows:
    """Rows of the training split for the majority controls, their texts alone, as often as wanted;
    to the evaluator the truth is "answer", whatever its key in the data."""

    _KEYS = ("question_id", "question", "answer_type")

    def __init__(self, data, answer):
        self._data, self._answer = data, answer
        self._rows = _in_order(ds_core.get(**data), data["name"])
        missing = [k for k in (answer, *self._KEYS) if k not in self._rows.element_spec]
        if missing:
            raise ValueError(
                f"train_data {data['name']} has no {missing[0]!r}, only "
                f"{sorted(self._rows.element_spec)}."
            )

    def __iter__(self):
        keys = (self._answer, *self._KEYS)
        for row in self._rows.map(lambda row: {k: row[k] for k in keys}).as_numpy_iterator():
            row = {k: v.decode() for k, v in row.items()}
            yield {**row, "answer": row[self._answer]}


def _about(section, inputs, folder, params):
    """What is evaluated, for metrics.json; as `experiment.about`, and which reader it came by."""
    flat = npz.flatten_tree(params)
    names = sorted(flat)
    prints = fingerprint.of_leaves([flat[n] for n in names])
    name, split = section["data"]["name"], section["data"]["split"]
    data = dict(name=name, split=split, examples=len(inputs), reader="big_vision")
    if builder := getattr(inputs.source, "builder", None):
        data["version"] = str(builder.version)
    return dict(
        split=" ".join(filter(None, [f"{name}/{data.get('version', '')}".rstrip("/"), split])),
        data=data,
        section=section,
        fingerprint=hashlib.sha256(json.dumps([names, prints]).encode()).hexdigest()[:32],
        versions=dict(
            paligemma_med=paligemma_med.__version__, jax=jax.__version__, tensorflow=tf.__version__
        ),
        checkpoint=folder and experiment._absolute(folder),
        command=shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]),
    )
