"""Pictures of shapes with words to say, as a TFDS data set: drawn by `raw.py`, read as SLAKE is."""

from data_prep.datasets.drawn.builder import DrawnBuilder
from data_prep.datasets.shapes_words import raw
from data_prep.datasets.shapes_words.raw import make_raw

__all__ = ["Builder", "make_raw"]


class Builder(DrawnBuilder):
    """Shapes, and words to say. `manual_dir` is a folder made by `make_raw`."""

    SETTINGS_NAME = raw.SETTINGS_NAME
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Run `python -m data_prep.build shapes_words`: it draws its images."
