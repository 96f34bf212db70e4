"""The phantoms as a TFDS data set: drawn by `raw.py`, read by the reader of SLAKE's layout."""

from data_prep.datasets.drawn.builder import DrawnBuilder
from data_prep.datasets.phantom import raw
from data_prep.datasets.phantom.raw import make_raw

__all__ = ["Builder", "make_raw"]


class Builder(DrawnBuilder):
    """Radiology phantoms. `manual_dir` is a folder made by `make_raw`."""

    SETTINGS_NAME = raw.SETTINGS_NAME
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Run `python -m data_prep.build phantom`: it draws its images."
