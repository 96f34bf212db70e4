"""Weights, batches and our own steps, for the tests that compare them with big_vision's."""

import itertools
import json
import os

import jax
import numpy as np

from configs import common
from configs.tiny_base import BASE
from paligemma_med import experiment, input_pipeline, weights
from paligemma_med.checkpoints import npz, workdir
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.parallel import sharding
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import optim, run_files
from paligemma_med.training import step as train_step
from tests.upstream import parity_config, replay


def config(stage, init="", **kw):
    more = "".join(f",{k}={v}" for k, v in kw.items())
    return parity_config.get_config(f"stage={stage},init={init}{more}")


def random_weights(c, seed=0):
    """A tree for every leaf of the model, the second factors of adapters included, which a fresh
    model has at zero."""
    rng = np.random.default_rng(seed)
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    flat = {}
    for name, x in abstract.items():
        scale = 1.0 / np.sqrt(max(1, np.prod(x.shape[-2:]) // x.shape[-1]))
        flat[name] = (scale * rng.normal(size=x.shape)).astype(np.float32)
    return unflatten_tree(flat)


def random_batches(c, steps, seed=1):
    """As the training pp makes them: prompts and answers of many lengths, then padding."""
    rng = np.random.default_rng(seed)
    rows, length = (steps, c.input.batch_size), c.text_len + 1
    prompt = rng.integers(2, length // 2, (*rows, 1))
    end = prompt + rng.integers(2, 6, (*rows, 1))  # supervised_len is 6
    place = np.arange(length)
    text = rng.integers(3, 1000, (*rows, length))
    answer = (place >= prompt) & (place < end)
    return dict(
        image=rng.uniform(-1, 1, (*rows, c.res, c.res, 3)).astype(np.float32),
        text=np.where(place < end, text, 0).astype(np.int32),
        mask_ar=(place >= prompt).astype(np.int32),
        mask_loss=answer.astype(np.int32),
    )


def slake_batches(c, steps, data_dir):
    """The first rows of SLAKE's training split, through the training pp."""
    pp = common.train_pp(c.res, c.text_len, c.tokenizer)
    data = dict(name="slake/en", split="train", data_dir=str(data_dir))
    rows = itertools.islice(input_pipeline.evaluation(data, pp, c.input.batch_size), steps)
    rows = [batch for batch, *_ in rows]
    keys = ("image", "text", "mask_ar", "mask_loss")
    return {k: np.stack([np.asarray(batch[k]) for batch in rows]) for k in keys}


def tiny_base(c, seed=0):
    """The tiny base model's weights, with random adapters where the config has some."""
    base = flatten_tree(npz.load_npz(BASE))
    return unflatten_tree(flatten_tree(random_weights(c, seed)) | base)


def our_steps(c, batches, save_at=None, folder=None):
    """Our own steps on these batches; with `save_at`, `folder` becomes the workdir of a run that
    stopped there. Gives [metrics of each step], {name: parameter at the end}."""
    model, mesh = experiment.make_model(c), experiment.make_mesh(c)
    with sharding.rules(c, mesh):
        names = optim.trained_names(c, list(experiment.abstract_params(c, model)))
        tx, learning_rate = optim.make(
            c,
            names,
            total_steps=c.total_steps,
            num_examples=replay.EXAMPLES,
            batch_size=c.input.batch_size,
        )
        params, _ = weights.initial_params(TrainingSetup.without_data(c, mesh=mesh))
        trained = {n: params.pop(n) for n in names}
        opt_state = jax.jit(tx.init)(trained)
        step = jax.jit(train_step.make_train_step(c, model, tx, learning_rate))
        rows = []
        for i in range(len(batches["text"])):
            batch = {k: v[i] for k, v in batches.items()}
            trained, opt_state, metrics = step(trained, opt_state, params, batch, i)
            rows.append({k: float(v) for k, v in metrics.items()})
            if i + 1 == save_at:
                os.makedirs(folder)
                run_files.start(folder, c, {}, 0)
                with workdir.Checkpoints(folder) as checkpoints:
                    checkpoints.save(i + 1, trained, opt_state, {})
    return rows, {**params, **trained}


def their_metrics(folder):
    """{step: row} of big_vision_metrics.txt, of the rows that have a loss.

    By `examples_seen`: big_vision itself may number a row as the step after (utils.py:1290 looks
    at the number later, in another thread), and writes the last one twice (utils.py:1296).
    """
    lines = (folder / "big_vision_metrics.txt").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "training_loss" in row]
    return {int(row["examples_seen"]) // parity_config.BATCH: row for row in rows}
