"""From a config to weights: which files fit, in which types they arrive, and what each mistake says."""

import json

import jax
import numpy as np
import pytest

from paligemma_med import checkpoints, experiment, quantise, weights
from paligemma_med.checkpoints import fingerprint, npz
from paligemma_med.config import files as config_files
from paligemma_med.models import lora_targets
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.setup import Setup, TrainingSetup
from paligemma_med.training import describe
from tests import tiny

HEAD = [("img/head/kernel", dict(decay_type="constant")), (".*", None)]


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """(path of an npz file with random weights for the tiny model, the same as a flat dict)."""
    c = tiny.config()
    flat = experiment.abstract_params(c, experiment.make_model(c))
    rng = np.random.default_rng(0)
    flat = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in flat.items()}
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    npz.save_npz(path, unflatten_tree(flat))
    return str(path), flat


def test_weights_from_a_file_in_the_types_asked_for(weights_file):
    path, flat = weights_file
    c = tiny.config(model_init=path, frozen_dtype="bfloat16", schedule=HEAD)
    c.sharding_strategy = [(".*", 'fsdp(axis="data", min_size_to_shard_mb=0)')]
    params, _ = weights.initial_params(TrainingSetup.without_data(c))
    assert params.keys() == flat.keys()
    for n, x in params.items():
        assert str(x.dtype) == ("float32" if n == "img/head/kernel" else "bfloat16")
        np.testing.assert_array_equal(np.asarray(x), flat[n].astype(x.dtype))
    table = params["llm/embedder/input_embedding"]
    assert table.addressable_shards[0].data.size * 8 == table.size


def test_towers_from_two_places(weights_file):
    path, flat = weights_file
    c = tiny.config(model_init=dict(img=f"{path}:img", llm=f"{path}:llm"))
    params = weights.load_host_params(c.model_init, flat)
    assert all((params[n] == flat[n]).all() for n in flat)
    plain = config_files.to_json(c)
    assert f"{path}:img" in plain


def test_positions_are_resampled_to_the_configs_resolution_if_asked(weights_file):
    c = tiny.config(model_init=weights_file[0], res=64)
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    with pytest.raises(checkpoints.CheckpointError, match="images of 32 px .*config.res = 64"):
        weights.load_host_params(c.model_init, abstract)
    found = weights.load_host_params(c.model_init, abstract, resample_posemb=True)
    assert found["img/pos_embedding"].shape == (1, 16, 32)


def test_weights_stay_in_their_file_until_they_are_placed(weights_file):
    """At 3B, host memory need not hold the whole checkpoint."""
    path, flat = weights_file
    host = weights.load_host_params(path, flat)
    assert all(isinstance(x, checkpoints.Lazy) for x in host.values())


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_model_init_takes_every_form(weights_file, tmp_path, form):
    path, flat = weights_file
    c = tiny.config(model_init=str(tmp_path / form))
    if form == "hf":
        model = c.model.to_dict()
        img, llm = model["img"], model["llm"]
        checkpoints.save_hf(c.model_init, checkpoints.open_params(path), img=img, llm=llm)
    else:
        from paligemma_med.checkpoints import orbax

        orbax.save_orbax(c.model_init, checkpoints.open_params(path))
    params, kept = weights.initial_params(TrainingSetup.without_data(c))
    assert not kept and params.keys() == flat.keys()
    for n, x in params.items():
        np.testing.assert_array_equal(np.asarray(x), flat[n], err_msg=n)


def test_weights_of_another_model(weights_file):
    model = dict(tiny.MODEL, llm=dict(tiny.MODEL["llm"], vocab_size=1152))
    c = tiny.config(model_init=weights_file[0], model=model)
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    message = "w.npz: .*\n.*input_embedding: expected \\(1152, 64\\), found \\(1024, 64\\)"
    with pytest.raises(checkpoints.CheckpointError, match=message):
        weights.load_host_params(c.model_init, abstract)


def test_random_weights_depend_on_the_seed_alone():
    # Shapes of few leaves are enough; compiled once a seed.
    c = tiny.config()
    a, b = (jax.device_get(weights.initial_params(TrainingSetup.without_data(c))[0]) for _ in range(2))
    c.seed = 4
    other = jax.device_get(weights.initial_params(TrainingSetup.without_data(c))[0])
    tiny.assert_trees_equal(a, b)
    assert (a["img/head/kernel"] != other["img/head/kernel"]).any()
    assert all(str(x.dtype) == "float32" for x in a.values())


def test_load_gives_frozen_weights_alone(weights_file):
    path, flat = weights_file
    c = tiny.config(frozen_dtype="bfloat16")
    _, tok, _, params = weights.load(c, path)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    assert tok.vocab_size <= 1024
    assert flatten_tree(params).keys() == flat.keys()


def test_weights_that_moved_are_those_that_the_run_began_with(weights_file, tmp_path, capsys):
    """A moved file that holds other weights would answer like another model."""
    path, flat = weights_file
    c = tiny.config(model_init=str(tmp_path / "gone.npz"), schedule=HEAD, base=path)
    run = str(tmp_path / "run")
    trained = {"img/head/kernel": flat["img/head/kernel"]}
    tiny.write_workdir(run, c, trained)
    frozen = [n for n in sorted(flat) if n not in trained]
    prints = dict(zip(frozen, fingerprint.of_leaves([flat[n] for n in frozen])))
    record = dict(model_init="gone.npz", frozen_dtype="float32", fingerprints=prints)
    (tmp_path / "run" / "base.json").write_text(json.dumps(record))
    *_, params = weights.load(c, run)
    np.testing.assert_array_equal(flatten_tree(params)["img/head/bias"], flat["img/head/bias"])
    npz.save_npz(tmp_path / "other.npz", unflatten_tree({**flat, "img/head/bias": flat["img/head/bias"] + 1}))
    with pytest.raises(checkpoints.CheckpointError, match="other.npz has other weights.*1 parameters.*img/head/bias"):
        weights.load(tiny.config(schedule=HEAD, base=str(tmp_path / "other.npz")), run)
    weights.load(tiny.config(base=str(tmp_path / "other.npz"), frozen_dtype="bfloat16"), run)
    assert "Not compared" in capsys.readouterr().err


def test_float16_that_cannot_hold_the_weights(weights_file, tmp_path):
    _, flat = weights_file
    npz.save_npz(tmp_path / "w.npz", unflatten_tree({**flat, "img/head/bias": flat["img/head/bias"] + 7e4}))
    with pytest.raises(checkpoints.CheckpointError, match="img/head/bias has numbers up to 7000.*float16 can't hold"):
        weights.load(tiny.config(frozen_dtype="float16"), str(tmp_path / "w.npz"))


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_load_quantises(weights_file, kind):
    """What is foretold of the leaves is what is there, and no kernel of a layer is left dense."""
    path, flat = weights_file
    c = tiny.config(frozen_dtype=kind)
    *_, params = weights.load(c, path)
    setup = Setup(c)
    found, abstract = flatten_tree(params), setup.abstract
    told = weights.stored_params(abstract, setup)
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {n: (x.shape, x.dtype) for n, x in told.items()}
    assert found["llm/layers/mlp/linear"].dtype == ("int8" if kind == "int8" else "uint8")
    assert found["llm/final_norm/scale"].dtype == "bfloat16"
    table = describe.parameters(setup)
    size = sum(x.nbytes for x in found.values())
    assert f"frozen, {size:,} bytes" in table and f"  {kind}  " in table
    with pytest.raises(checkpoints.CheckpointError, match="is quantised; merge into the base's"):
        rules = [("llm/layers/mlp/linear", dict(rank=1))]
        specs = lora_targets.resolve(rules, abstract)
        factors = dict(zip(lora_targets.factor_names(specs), (np.ones((1, 128, 1)), np.ones((1, 1, 64)))))
        checkpoints.merge(unflatten_tree({**found, **factors}), specs)


def test_random_weights_are_not_quantised():
    c = tiny.config(frozen_dtype="int8", schedule=HEAD)
    with pytest.raises(ValueError, match="config.model_init gives, but it gives none for img/Tr"):
        weights.initial_params(TrainingSetup.without_data(c))
