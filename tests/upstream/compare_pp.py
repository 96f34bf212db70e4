"""Every pp string of our configs, through big_vision's ops and through ours: a program for test_pp.

    python -m tests.upstream.compare_pp DATA_DIR NAME SPLIT STEP [CONFIGS]

Reads every STEP-th row of a set (array_record) and prints one JSON object: for each string how many
rows it saw, and the largest difference of images in grey levels. CONFIGS: a regex of their names.
Ends with an error at the first text, mask or key that differs. $PALIGEMMA_TOKENIZER may name
Gemma's file; without it the strings that ask for Gemma get `tiny` in its place.
"""

import importlib
import json
import os
import sys

import numpy as np

from configs import common
from paligemma_med import input_pipeline, upstream
from paligemma_med.pp import get_preprocess_fn, registry
from tests.upstream.pp_strings import config_strings, fixed

upstream.install()
import big_vision.pp.builder as bv_builder  # noqa: E402  after install
import tensorflow as tf  # noqa: E402

from paligemma_med.upstream.config import PP_MODULES  # noqa: E402

GREY = 2 / 255 * 2 + 1e-6  # two grey levels, of images in [-1, 1]


def as_others_have_it(row):
    """A row with the keys that other sets of ours have too."""
    extra = {f"choice_{x}": f"option {x}: {row['answer']}" for x in "abcd"}
    history = np.arange(5, 12, dtype=np.int32)  # tokens of earlier turns, in dialogues
    return {**row, **extra, "answer_letter": "C", "location_category": "", "history": history}


def to_tf(row):
    """The row as big_vision's reader gives it: a dict of tensors, nested ones left out."""
    return {k: tf.constant(v) for k, v in row.items() if not isinstance(v, dict)}


def in_graph(fn):
    """`fn` compiled into a graph, as tf.data runs it; it may change the dict it is given."""
    return tf.function(lambda row: fn(dict(row)))


def difference(ours, theirs, where):
    """Grey levels between the images. Raises AssertionError if anything else isn't equal."""
    ours = {k: v for k, v in ours.items() if not k.startswith("_") and not isinstance(v, dict)}
    assert ours.keys() == theirs.keys(), f"{where}: {sorted(ours)}, {sorted(theirs)}"
    worst = 0.0
    for key, value in theirs.items():
        own, value = np.asarray(ours[key]), value.numpy()
        if key == "image" and own.dtype == np.float32:
            assert own.shape == value.shape and value.dtype == own.dtype, where
            worst = float(np.abs(own - value).max())
        elif isinstance(value, bytes):
            own = ours[key].encode() if isinstance(ours[key], str) else ours[key]
            assert own == value, f"{where}: {key}"
        else:
            assert own.dtype == value.dtype, f"{where}: {key}: {own.dtype}, {value.dtype}"
            np.testing.assert_array_equal(own, value, err_msg=f"{where}: {key}")
    return worst


def main(data_dir, name, split, step, configs=".*"):
    for module in PP_MODULES:
        importlib.import_module(f"big_vision.pp.{module}")
    source = input_pipeline.open_source(dict(name=name, split=split, data_dir=data_dir))
    rows = [as_others_have_it(source[i]) for i in range(0, len(source), int(step))]
    out, seen = {}, set()
    for pp, where in config_strings(configs).items():
        # Both build the whole string, random ops and all; rows go through what is left of it.
        if not os.environ.get("PALIGEMMA_TOKENIZER"):
            pp = pp.replace(repr(common.GEMMA), "'tiny'")
        get_preprocess_fn(pp)
        bv_builder.get_preprocess_fn(pp)(to_tf(rows[0]))
        pp = fixed(pp)
        if pp in seen:
            continue
        seen.add(pp)
        ours = get_preprocess_fn(pp)
        theirs = in_graph(bv_builder.get_preprocess_fn(pp, log_data=False))
        worst = 0.0
        for row in rows:
            at = f"{where}, question {row['question_id']}"
            worst = max(worst, difference(ours(row), theirs(to_tf(row)), at))
        assert worst <= GREY, f"{where}: images differ by {worst * 127.5} grey levels"
        ops = sorted({registry.parse_call(op)[0] for op in registry.split(pp)})
        out[where] = dict(rows=len(rows), grey=round(worst * 127.5, 3), ops=ops)
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
