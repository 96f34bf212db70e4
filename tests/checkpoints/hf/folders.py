"""Directories of the tiny random models of tests/models/hf.py, written by transformers or by us, and edits of them."""

import functools
import json
import pathlib

import jax
import numpy as np
import safetensors.numpy

from paligemma_med.checkpoints import hf
from tests.models import hf as reference

INDEX = "model.safetensors.index.json"


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, image, text, mask_ar):
    return model.apply({"params": params}, image, text, mask_ar)[0]


def theirs_saved(name, folder, **kw):
    """A reference case written by transformers; returns our tree of it, by the other mapping."""
    case, model, _, params, _ = reference.reference(name)
    model.save_pretrained(folder, **kw)
    return case, params


def ours_saved(name, folder, **kw):
    case, _, _, params, _ = reference.reference(name)
    hf.save_hf(folder, params, img=case["img"] | {"variant": None}, llm=dicts(case)[1], **kw)
    return case, params


def dicts(case):
    return dict(case["img"], variant=None), dict(case["llm"], variant=None)


def tensors_of(folder):
    """{name: array} of all files of a directory."""
    out = {}
    for file in pathlib.Path(folder).glob("*.safetensors"):
        out |= safetensors.numpy.load_file(file)
    return out


def rewrite(folder, tensors):
    """Makes a directory's weights one file of `tensors`."""
    for file in [*pathlib.Path(folder).glob("*.safetensors"), pathlib.Path(folder, INDEX)]:
        file.unlink(missing_ok=True)
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, section=None, /, **kw):
    path = pathlib.Path(folder, "config.json")
    config = json.loads(path.read_text())
    where = config[section] if section else config
    for key, value in kw.items():
        where.pop(key, None)
        if value is not ...:
            where[key] = value
    path.write_text(json.dumps(config))
