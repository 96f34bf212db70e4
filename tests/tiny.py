"""What tests of training share: a drawn data set, a config of 0.1 million parameters, one batch."""

import os

import jax
import ml_collections
import numpy as np

from configs import common
from data_prep import build
from paligemma_med import experiment
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from paligemma_med.evaluation import results

MODEL = dict(
    img=dict(variant="mu/16", scan=False, remat_policy="none"),
    llm=dict(variant="gemma_mu", depth=1, scan=False, remat_policy="none"),
)
RES, TEXT_LEN = 32, 40
NUM_IMAGES = (16, 4, 4)


def build_data(folder):
    """Builds a phantom data set of a few dozen questions in `folder`."""
    build.build("phantom", data_dir=folder, num_images=NUM_IMAGES)


def config(data_dir=None, **kw):
    """A config of everything that `train` reads; 6 steps of 16 questions."""
    c = ml_collections.ConfigDict()
    c.seed = 3
    c.res, c.text_len, c.tokenizer = RES, TEXT_LEN, "tiny"
    c.model = MODEL
    c.model_init = None
    c.input = dict(
        data=dict(name="phantom", split="train", data_dir=str(data_dir)),
        pp=common.train_pp(RES, TEXT_LEN, "tiny"),
        batch_size=16,
        num_threads=1,
    )
    c.predict_pp = common.eval_pp(RES, TEXT_LEN, "tiny", keep=())
    c.total_steps = 6
    c.optax_name = "scale_by_adam"
    c.lr = 1e-3
    c.schedule = dict(decay_type="cosine", warmup_steps=2)
    c.log_training_steps = 1
    c.evals = dict(
        val=dict(
            type="vqa",
            data=dict(name="phantom", split="validate", data_dir=str(data_dir)),
            train_data=dict(name="phantom", split="train", data_dir=str(data_dir)),
            pp_fn=common.eval_pp(RES, TEXT_LEN, "tiny"),
            batch_size=32,
            pred_kw=dict(max_new_tokens=4),
            log_steps=3,
        )
    )
    for key, value in kw.items():
        if key in c:
            del c[key]  # or a dict would be merged into the one there is
        c[key] = value
    return c


def batch(rows=8, length=13, vocab=1024, seed=0):
    """A batch as the train pp makes it, with answers of 1 to 5 tokens, as numpy arrays."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, 6, rows)
    suffix = 1 + np.arange(rows) % 5
    place = np.arange(length)[None]
    is_suffix = (place >= prefix[:, None]) & (place < (prefix + suffix)[:, None])
    is_text = place < (prefix + suffix)[:, None]
    return {
        "image": rng.uniform(-1, 1, (rows, RES, RES, 3)).astype(np.float32),
        "text": np.where(is_text, rng.integers(3, vocab, (rows, length)), 0).astype(np.int32),
        "mask_ar": (place >= prefix[:, None]).astype(np.int32),
        "mask_loss": is_suffix.astype(np.int32),
    }


def write_workdir(folder, c, weights=None, seed=0):
    """A workdir as `train` leaves it, with random weights (or those given as trained) and no training."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        f.write(config_files.to_json(c))
    rng = np.random.default_rng(seed)
    if weights is None:
        abstract = experiment.abstract_params(c, experiment.make_model(c))
        weights = {n: rng.normal(0, 0.1, x.shape).astype("float32") for n, x in abstract.items()}
    with workdirs.Checkpoints(folder) as checkpoints:
        checkpoints.save(2, weights, {})
        checkpoints.wait()


def assert_same_eval(a, b):
    """Two folders of an evaluation: the same predictions to the byte, the same figures of the same,
    though it lay elsewhere."""
    found = []
    for folder in (a, b):
        metrics, about = results.read_metrics(os.path.join(folder, "metrics.json"))
        about = {k: v for k, v in about.items() if k not in ("checkpoint", "command")}
        with open(os.path.join(folder, "predictions.jsonl"), "rb") as f:
            found.append((f.read(), metrics, about))
        assert about["fingerprint"]
    assert found[0] == found[1]


def assert_trees_equal(a, b):
    """Same structure, same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
