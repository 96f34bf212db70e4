"""The first lesson: single shapes on a plain ground, and descriptions alone."""

import json

import numpy as np

from data_prep.build import build
from data_prep.datasets.shapes.draw import easy_scene
from data_prep.datasets.shapes_easy import raw
from data_prep.datasets.slake import layout as slake_layout


def test_scenes_are_easy():
    rng = np.random.default_rng(0)
    scenes = [easy_scene(rng) for _ in range(300)]
    assert {s.background for s in scenes} == {"Plain"} and {s.grey for s in scenes} == {True, False}
    assert {len(s.items) for s in scenes} == {0, 1}
    assert np.mean([len(s.items) for s in scenes]) > 0.9


def test_builds_and_asks_for_descriptions_alone(tmp_path):
    build("shapes_easy", data_dir=tmp_path, num_images=(20, 2, 2), seed=3)
    folder = tmp_path / "downloads" / "shapes_easy"
    read = slake_layout.read_folder(folder, "en")
    assert [s["images"] for s in read.report["splits"].values()] == [20, 2, 2]
    rows = json.loads((folder / "train.json").read_text())
    assert {r["content_type"] for r in rows} == {"Description"} and len(rows) == 60
    assert (folder / raw.SETTINGS_NAME).is_file()
