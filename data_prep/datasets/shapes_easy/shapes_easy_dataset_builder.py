"""Easy pictures of shapes as a TFDS data set: drawn by `raw.py`, read as SLAKE is."""

from data_prep.datasets.drawn.builder import DrawnBuilder
from data_prep.datasets.shapes_easy import raw
from data_prep.datasets.shapes_easy.raw import make_raw

__all__ = ["Builder", "make_raw"]


class Builder(DrawnBuilder):
    """Single plain shapes. `manual_dir` is a folder made by `make_raw`."""

    SETTINGS_NAME = raw.SETTINGS_NAME
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Run `python -m data_prep.build shapes_easy`: it draws its images."
