"""The config of a run as a config file: what --workdir=RUN --config.key=value changes.

`cli.parse_flags` names this file in place of a missing --config. The argument after the colon is the run's folder.
"""

from ml_collections import ConfigDict, config_dict

from paligemma_med.config import files as config_files

# What a config may lack or have as None, which the command line could not change, and the type of its value.
_OPEN = dict(
    model_init=str, adapter_init=str, frozen_dtype=str, base=str, supervised_len=int, loss_chunk=int, peak_tflops=float
)
_SWITCHES = ("resample_posemb", "allow_nonfinite")


def get_config(folder) -> ConfigDict:
    """config.json of the run in `folder`.

    Raises:
      ValueError: it is no run's, or damaged.
    """
    from paligemma_med.checkpoints import workdir  # it needs Orbax

    try:
        config = config_files.from_json(workdir.read_config(folder))
    except OSError as e:  # which config_flags would only tell when the config is used
        raise ValueError(str(e)) from None
    for key, kind in _OPEN.items():
        if config.get(key) is None:
            config[key] = config_dict.placeholder(kind)
    for key in _SWITCHES:
        config[key] = config.get(key) or False
    return config
