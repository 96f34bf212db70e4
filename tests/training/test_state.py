"""The state of a run: what is trained, what is frozen and kept, and what a checkpoint gives back."""

import numpy as np
import pytest

from paligemma_med.checkpoints import npz
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import run_files
from paligemma_med.training import state as states
from tests import tiny

HEAD = [("img/head/.*", dict(decay_type="constant")), (".*", None)]


@pytest.fixture(scope="module")
def setup():
    return TrainingSetup.without_data(tiny.config(schedule=HEAD))


def test_abstract_is_what_initial_gives(setup):
    state, shapes = states.initial(setup), states.abstract(setup)
    for found, expected in ((state.trained, shapes.trained), (state.frozen, shapes.frozen)):
        assert {n: (x.shape, x.dtype, x.sharding) for n, x in found.items()} == {
            n: (x.shape, x.dtype, x.sharding) for n, x in expected.items()
        }
    assert flatten_tree(state.params).keys() == setup.abstract.keys()


def test_frozen_leaves_that_no_file_gives_are_kept(setup, tmp_path):
    assert states.initial(setup).kept_leaves.keys() == setup.abstract.keys() - set(setup.trained_names)
    whole = {n: np.zeros(x.shape, np.float32) for n, x in setup.abstract.items()}
    npz.save_npz(tmp_path / "w.npz", unflatten_tree(whole))
    state = states.initial(TrainingSetup.without_data(tiny.config(schedule=HEAD, model_init=str(tmp_path / "w.npz"))))
    assert not state.kept_leaves and state.base_leaves.keys() == state.frozen.keys()


def test_restored_state_is_the_saved_one(setup, tmp_path):
    workdir = str(tmp_path / "w")
    state = states.initial(setup)
    with workdirs.Checkpoints(workdir) as checkpoints:
        assert states.restore(state, checkpoints, workdir) is state
        state.step, state.skipped_steps, state.input = 3, 1, {"next_step": 3}
        run_files.start(workdir, setup.config, state.kept_leaves, 0)
        states.save(state, checkpoints)
        checkpoints.wait()
        other = tiny.config(schedule=HEAD, seed=4)  # whose random base is another one
        found = states.restore(states.initial(TrainingSetup.without_data(other)), checkpoints, workdir)
    assert (found.step, found.skipped_steps, found.input) == (3, 1, {"next_step": 3})
    tiny.assert_trees_equal(found.params, state.params)
    assert found.kept == state.kept
