"""What config.json says of the paths in a config."""

from paligemma_med.config import files as config_files
from tests import tiny


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for init in ("w.npz", "w.npz:img", "runs/one"):
        c = tiny.config(model_init=init)
        assert f'"model_init": "{tmp_path}/{init}"' in config_files.to_json(c)
        assert c.model_init == init
    assert '"model_init": null' in config_files.to_json(tiny.config())
