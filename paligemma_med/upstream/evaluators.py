"""This project's evaluators inside big_vision's training loop: evals[name].type = "paligemma_med".

Questions, scores and files are those of `paligemma_med.evaluators`. Rows come from big_vision's data
sources, so that the tfrecord build suffices, but they are preprocessed by our pp ops and not
TensorFlow's, whose images differ in the last bits. That is enough to change an answer when two
candidates tie; this way a checkpoint has exactly the same figures in its loop and with
`paligemma_med.evaluate`.

Built from the sections of config.evals that `upstream.config.translate` returns. Files go where our
training puts them: <workdir>/eval/<name>/.
"""

import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from absl import flags
from big_vision.datasets import core as ds_core

from paligemma_med import experiment, input_pipeline
from paligemma_med.config import values as config_values
from paligemma_med.evaluation.controls import TrainingRows
from paligemma_med.parallel import sharding
from paligemma_med.pp.files import path_inside

API = "jit"  # big_vision reads it from each evaluator


class Evaluator:
    """One of `paligemma_med.evaluators` with the interface of big_vision's loop."""

    def __init__(self, predict_fn, *, section, name, tokenizer, devices, batch_size=None):
        """Arguments as `big_vision.evaluators.common.from_config` gives them.

        Args:
          predict_fn: any of big_vision's predict_fns; only its model is used.
          section: our section of config.evals, a dict.
          name: its name, for <workdir>/eval/<name>/.
          tokenizer: the model's, a spec as for `pp.tokenizer.get_tokenizer`.
          devices: in the order of the batches' rows.
          batch_size: the trainer's own, for sections that have none.

        Raises:
          ValueError: an unknown evaluator, a missing setting, or a run with several processes.
        """
        where = f"config.evals.{name}"
        if jax.process_count() > 1:
            raise ValueError(
                f"{where}: in big_vision's loop our evaluators run in one process, found "
                f"{jax.process_count()}: leave config.evals empty there, and evaluate its "
                "checkpoints with paligemma_med.evaluate."
            )
        module = experiment.evaluator_module(section["type"], where)
        experiment.check_eval_keys(section, module.Evaluator, where)
        kw = {k: v for k, v in section.items() if k not in ("type", *config_values.NOT_ARGUMENTS)}
        folder = flags.FLAGS.workdir
        try:
            size = kw.pop("batch_size", None) or batch_size
            inputs = open_input(kw.pop("data"), kw.pop("pp_fn"), size, devices)
            if train_data := kw.pop("train_data", None):
                answer = kw.pop("train_answer", "answer")
                kw["train_data"] = _training_rows(train_data, answer)
            self._evaluator = module.Evaluator(
                model_of(predict_fn),
                tokenizer,
                inputs=inputs,
                total=len(inputs),
                outdir=os.fspath(path_inside(os.path.join(folder, "eval"), name)) if folder else None,
                about=functools.partial(_about, section, inputs, folder),
                **kw,
            )
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e

    def run(self, train_state) -> Iterator[tuple[str, float]]:
        """Yields (name, number) of each figure, as `metrics.scoring` describes them."""
        # big_vision's trainer forbids transfers that aren't spelled out; ours are small.
        with jax.transfer_guard("allow"):
            metrics = self._evaluator.run(train_state["params"])
        yield from metrics.items()


def model_of(predict_fn) -> Any:
    """The model of one of `predict_fns.get_all(model)`, which big_vision may have wrapped in a partial with
    pred_kw."""
    fn = getattr(predict_fn, "fn", predict_fn)
    return fn.keywords["model"]


def open_input(data, pp_fn, batch_size, devices) -> input_pipeline.EvalInput:
    """A split that big_vision reads, as an `input_pipeline.EvalInput` for our evaluators; its `source` is
    big_vision's data source."""
    mesh = jax.sharding.Mesh(devices, (sharding.DATA_AXIS,))
    source = ds_core.get(**data)
    rows = _Rows(source, data)
    out = input_pipeline.EvalInput(
        _Batches(rows, pp_fn, batch_size),
        num_examples=len(rows),
        batch_size=batch_size,
        sharding=sharding.batch_sharding(mesh),
        piece=0,
        name=str(rows),
    )
    out.source = source
    return out


class _Batches:
    """The batches of an EvalInput: each pass makes them one by one, in order."""

    def __init__(self, rows, pp_fn, batch_size):
        self._rows = rows
        self._size = batch_size
        preprocess = input_pipeline.Preprocess(pp_fn, rows)
        self._make = functools.partial(input_pipeline.EvalBatch, pp=preprocess, piece=0, pieces=1)

    def __iter__(self):
        make = self._make(_InOrder(self._rows), batch_size=self._size)
        for batch in range(math.ceil(len(self._rows) / self._size)):
            yield make(batch)


class _InOrder:
    """One pass over rows that can only be iterated: `[i]` for i = 0, 1, 2, …"""

    def __init__(self, rows):
        self._rows, self._iterator, self._next = rows, iter(rows), 0

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        assert index == self._next
        self._next += 1
        return next(self._iterator)


class _Rows:
    """A split's rows in the form of `input_pipeline.Source`: encoded images as the bytes of the file, text
    as str, lists of texts as lists, numbers as numpy."""

    def __init__(self, source, data):
        self._name = f"data set {data['name']} split {data.get('split')}"
        self._length = source.total_examples
        self._data = _in_order(source, data["name"])

    def __len__(self):
        return self._length

    def __iter__(self):
        for row in self._data.as_numpy_iterator():
            yield {k: _plain(k, v) for k, v in row.items() if k not in ("_id", "tfds_id")}

    def __str__(self):
        return self._name


def _in_order(source, name):
    """The split's examples in the order of its files, like other readers of TFDS; by default tf.data
    alternates between files (blocks of 16 examples)."""
    kw = {} if name.startswith("bv:") else {"interleave_cycle_length": 1}
    return source.get_tfdata(ordered=True, **kw)


def _plain(key, value):
    """bytes → str, except for images; arrays of bytes → lists of str; also in nested dicts."""
    if isinstance(value, dict):
        return {k: _plain(k, v) for k, v in value.items()}
    if isinstance(value, bytes) and key != "image":
        return value.decode()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(key, v) for v in value]
    return value


def _training_rows(data, answer):
    """Texts of the training split, for the majority controls."""
    rows = _in_order(ds_core.get(**data), data["name"])

    def read(keys):
        for row in rows.map(lambda row: {k: row[k] for k in keys}).as_numpy_iterator():
            yield {k: _plain(k, v) for k, v in row.items()}

    return TrainingRows(read, list(rows.element_spec), answer=answer, name=f"data set {data['name']}")


def _about(section, inputs, folder, params):
    """What is evaluated, for metrics.json: `experiment.about`, and which reader was used."""
    where = section["data"]
    data = dict(name=where["name"], split=where.get("split"), examples=len(inputs))
    if builder := getattr(inputs.source, "builder", None):
        data["version"] = str(builder.version)
    out = experiment.about(section, folder, params, data | dict(reader="big_vision"))
    out["versions"]["tensorflow"] = tf.__version__
    return out
