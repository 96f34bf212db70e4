"""Finds the images of pairs by id: in a folder or zip, a release, or a built data set."""

import importlib
import io
import pathlib
from collections.abc import Callable

import PIL.Image

from data_prep import build
from data_prep.builders.captioned import CaptionedBuilder
from data_prep.builders.figures import SPLITS
from data_prep.files import DataError
from data_prep.images import convert as images
from data_prep.images import store as image_store
from paligemma_med.pp import images as reader

SIDE = 512  # pixels, at most
SUFFIXES = (*reader.SUFFIXES, "")
EXPECTED = (
    "expected a folder or .zip of images, release:NAME:FOLDER[:SPLIT] such as "
    "release:medpix2:~/MedPix-2.0, or tfds:NAME/CONFIG[:SPLIT] such as tfds:medpix2/caption"
)


def open_pictures(spec, data_dir=None) -> Callable:
    """Opens one --images: a function from an image id to the file's bytes, or None if there is no file.

    Args:
      spec: see EXPECTED; without a split all are searched.
      data_dir: where TFDS data sets are; None: TFDS' default.

    Raises:
      ValueError: nothing of the kind exists.
    """
    if spec.startswith("tfds:"):
        return _tfds(spec, data_dir)
    if spec.startswith("release:"):
        return _release(spec)
    try:
        store = image_store.open_store(spec, by_name=True)
    except DataError as e:
        raise ValueError(f"--images={spec}: {e}; {EXPECTED}.") from None
    return lambda image_id: _first(store, [image_id + s for s in SUFFIXES])


def _first(store, names):
    for name in names:
        try:
            if store.has(name):
                return store.read(name)
        except DataError:  # an id that leaves the folder, or a file that isn't an image
            continue
    return None


def _release(spec):
    _, name, folder = (spec.split(":", 2) + ["", ""])[:3]
    rest, _, last = folder.rpartition(":")
    folder, wanted = (rest, (last,)) if rest and last in SPLITS else (folder, SPLITS)
    known = [n for n in build.BUILDERS if (b := _builder(n)) and issubclass(b, CaptionedBuilder)]
    if name not in known or not folder:
        raise ValueError(f"--images={spec}: expected release:NAME:FOLDER with NAME one of {', '.join(known)}.")
    builder = _builder(name)
    release = builder.read_release(builder.check_manual_dir(pathlib.Path(folder).expanduser()))
    stores = {split: image_store.open_store(root, by_name=True) for split, root in release.images.items() if root}
    figures = {i: (s, f) for s in wanted for i, f in release.figures.get(s, {}).items()}

    def find(image_id):
        split, figure = figures.get(image_id, (None, None))
        return _first(stores[split], figure.names) if split in stores else None

    return find


def _builder(name):
    return importlib.import_module(build.BUILDERS[name]).Builder


def _tfds(spec, data_dir):
    from paligemma_med import input_pipeline  # JAX takes seconds to import

    name, _, split = spec.removeprefix("tfds:").partition(":")
    where = dict(data_dir=str(data_dir)) if data_dir else {}
    sources, problem = [], None
    for part in [split] if split else SPLITS:
        try:
            sources.append(input_pipeline.open_source(dict(name=name, split=part, **where)))
        except ValueError as e:  # a set may lack a split
            problem = e
    if not sources:
        raise ValueError(f"--images={spec}: {problem}")
    index = {}
    for source in sources:
        for i, row in enumerate(source.columns(("image_id",))):
            index.setdefault(row["image_id"], (source, i))

    def find(image_id):
        source, i = index.get(image_id, (None, None))
        return source[i]["image"] if source else None

    return find


def shrunk(content) -> bytes:
    """JPEG of an image, at most SIDE pixels wide and high; ValueError if it can't be read."""
    image = PIL.Image.fromarray(images.to_rgb(content))
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
