"""Names that come from a config, a data set or a table become no path outside their folder, and no import."""

import json
import shutil
import sys

import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import report
from data_prep.curate import rows as curate_rows
from data_prep.files import DataError
from data_prep.images import store
from paligemma_med import checkpoints, evaluate, experiment, input_pipeline
from paligemma_med.checkpoints import CheckpointError
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.explain import questions
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.pp import files as pp_files
from tests import tiny

# None of them may name a file of a folder "in" beside a folder "out".
ESCAPES = (
    "/out/x",
    "../out/x",
    "a/../../out/x",
    "..",
    "a/..",
    "C:\\out",
    "..\\out\\x",
    "\\out",
    "x\0y",
    "",
    " ",
    "//out/x",
)


@given(st.text(alphabet="./\\:aC\0~ \n", max_size=12) | st.sampled_from(ESCAPES))
def test_a_name_stays_inside_its_folder_or_is_refused(name):
    try:
        path = pp_files.path_inside("/in", name)
    except ValueError as e:
        assert "expected a relative path inside" in str(e)
        return
    assert path.is_relative_to("/in") and ".." not in path.parts and "\0" not in str(path)


@pytest.mark.parametrize("name", [7, None, ["a"], {"a": 1}, True])
def test_what_is_no_text_is_refused(name):
    with pytest.raises(ValueError, match="expected a relative path inside /in"):
        pp_files.path_inside("/in", name)


@pytest.mark.parametrize("name", [e for e in ESCAPES if "." not in e])
def test_an_evaluations_name_in_a_workdir_writes_nowhere_else(tmp_path, name):
    """As in a config.json that somebody else made."""
    name = name.replace("/out", f"{tmp_path}/out")
    c = tiny.config(tmp_path / "data")
    c.evals = {name: c.evals.val.to_dict()}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(c.to_dict()))
    config = ml_collections.ConfigDict(workdirs.read_config(run))
    with pytest.raises(ValueError, match="config.evals has the name"):
        evaluate.evaluate(config, str(run), str(run))
    with pytest.raises(ValueError, match="expected a relative path inside"):
        experiment.make_evaluators(c, None, None, None, str(run))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def changed(tiny_data, tmp_path, change, file):
    """A copy of the tiny data set, one of its JSON files changed; as `data` of a config."""
    folder = next(tiny_data.glob("*/*/dataset_info.json")).parent
    copy = tmp_path / "data" / folder.relative_to(tiny_data)
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return dict(name=copy.parent.name, split="train", data_dir=str(tmp_path / "data")), copy


@pytest.mark.parametrize("template", ["/{SPLIT}", "../../{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"])
def test_a_data_sets_files_are_in_its_folder(tiny_data, tmp_path, template):
    def change(info):
        for split in info["splits"]:
            split["filepathTemplate"] = template

    data, _ = changed(tiny_data, tmp_path, change, "dataset_info.json")
    with pytest.raises(input_pipeline.InputError, match=r"dataset_info.json names .*; expected a file of this folder"):
        input_pipeline.open_source(data)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that came with the data; importing it is noticed."""
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "trap_module.Feature"
    assert "trap_module" not in sys.modules


@pytest.mark.parametrize("where", ["top", "inside", "legacy"])
def test_a_data_set_imports_nothing(tiny_data, tmp_path, trap, where):
    def change(features):
        if where == "top":
            features["pythonClassName"] = trap
        elif where == "inside":
            first = next(iter(features["featuresDict"]["features"].values()))
            first["pythonClassName"] = trap
        else:
            features.clear()
            features.update(type=trap, content={})

    data, folder = changed(tiny_data, tmp_path, change, "features.json")
    says = r"features.json names the class 'trap_module.Feature', which would be imported; expected tensorflow_datasets"
    with pytest.raises(input_pipeline.InputError, match=says):
        input_pipeline.open_source(data)
    with pytest.raises(DataError, match=says):
        report.describe_set(data["name"], folder, None)
    with pytest.raises(DataError, match=says):
        curate_rows.open_source(f"tfds:{data['name']}:train", data["data_dir"])


@pytest.mark.parametrize("name", [e for e in ESCAPES if e.strip()])
def test_images_that_tables_name_are_below_their_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_bytes(b"secret")
    with pytest.raises(DataError, match="expected a relative path inside"):
        store.open_store(tmp_path / "in").has(name)
    if "\0" in name or "\\" in name:  # on Linux a part of a name
        return
    table = tmp_path / "q.csv"
    table.write_text(f"image,question\n{name.replace('/out', str(tmp_path / 'out'), 1)},What is shown?\n")
    (asked,) = questions.read_questions(table, tmp_path / "in")
    with pytest.raises(ValueError, match="leaves the folder|can't be understood"):
        asked.content()


@pytest.mark.parametrize("key", ["img/../../../../evil", "..", ".", "img/./x", "/evil", "img//evil", "img/x\0y"])
def test_a_leaf_of_weights_has_a_name_that_is_no_way_out(tmp_path, key):
    np.savez(tmp_path / "w.npz", **{f"params/{key}".replace("\0", "_"): np.ones(2, np.float32)})
    if "\0" not in key:  # zip files end a name there
        with pytest.raises(CheckpointError, match="key .* has an? "):
            checkpoints.open_params(str(tmp_path / "w.npz"))
    with pytest.raises(CheckpointError, match="key .* has an? "):
        unflatten_tree({key: np.ones(2)})
