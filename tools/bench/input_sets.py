"""The same pictures as different kinds of data set, for the benchmarks of the input: drawn here, so that no release
is needed.

Pictures are grey, with smooth shapes and noise, at the size of SLAKE's. Their questions are the same in all sets, and
so is the order of the rows. What differs is where a row's image lies and how it is stored. JPEG loses some of the
picture, so the others are made of what a JPEG file decodes to: all sets show the same pixels.
"""

import csv
import functools
import io
import pathlib
from collections.abc import Callable

import numpy as np
import PIL.Image

from paligemma_med.pp import images

_ROWS = 256
_SIDE = 448  # pixels; most of SLAKE's images have this size
_QUALITY = 90
_COLUMNS = ("question_id", "image_id", "image", "question", "answer", "answer_type", "split")


@functools.cache
def pictures(count=_ROWS, side=_SIDE) -> tuple[np.ndarray, ...]:
    """uint8[side, side] of each row, as its JPEG file decodes."""
    return tuple(np.asarray(images.open_image(_jpeg(i, side))) for i in range(count))


@functools.cache
def _jpeg(i, side):
    rng = np.random.default_rng([2, i])
    coarse = PIL.Image.fromarray(rng.uniform(0, 255, (8, 8)).astype(np.float32)).resize((side, side), 3)
    noise = rng.normal(0, 4, (side, side))
    picture = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
    return _encode(picture, format="JPEG", quality=_QUALITY)


def _encode(picture, **how):
    out = io.BytesIO()
    PIL.Image.fromarray(picture).save(out, **how)
    return out.getvalue()


def jpeg(i, picture) -> bytes:
    """A grey JPEG file."""
    return _jpeg(i, len(picture))


def png(i, picture) -> bytes:
    """A grey PNG file of 8 bits."""
    return _encode(picture, format="PNG")


def dicom_8(i, picture) -> bytes:
    """An uncompressed DICOM file of 8 bits without a window: levels as a screen shows them."""
    return _dicom(picture, bits=8)


def dicom_16(i, picture) -> bytes:
    """An uncompressed DICOM file with 12 of 16 bits stored, as scanners write them, and a window that gives the
    picture's levels: v / 16 (PS3.3 C.11.2.1.2)."""
    return _dicom(picture.astype(np.uint16) * 16, bits=12, WindowCenter=2040.5, WindowWidth=4081)


def _dicom(values, bits, **elements):
    from pydicom import dataset, uid

    meta = dataset.FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds = dataset.FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128, is_little_endian=True)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = values.itemsize * 8, bits, bits - 1
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OB" if values.itemsize == 1 else "OW"
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def rows(count) -> list[dict[str, str]]:
    """The texts of a row: those of `_COLUMNS` but the image."""
    return [
        dict(
            question_id=f"q{i}",
            image_id=f"picture{i}",
            question=f"Which organ is in picture {i}?",
            answer=f"organ {i % 7}",
            answer_type="OPEN",
            split="train",
        )
        for i in range(count)
    ]


def write_table(folder, encode: Callable, count=_ROWS, side=_SIDE) -> dict:
    """Writes table.csv and a file for each image, encode(i, picture); returns `data` for `input_pipeline.training`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    suffix = "dcm" if encode in (dicom_8, dicom_16) else encode.__name__
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, _COLUMNS)
        table.writeheader()
        for i, (row, picture) in enumerate(zip(rows(count), pictures(count, side), strict=True)):
            name = f"picture{i}.{suffix}"
            (folder / name).write_bytes(encode(i, picture))
            table.writerow({**row, "image": name})
    return dict(name=f"table:{folder / 'table.csv'}", split="train")


def write_tfds(folder, encode: Callable, count=_ROWS, side=_SIDE) -> dict:
    """Builds a TFDS set with the features of our builders; returns `data` for `input_pipeline.training`."""
    import tensorflow_datasets as tfds

    from data_prep.builders import vqa

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The pictures of a benchmark."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = pathlib.Path(folder)

        def _info(self):
            features = vqa.vqa_features(split=tfds.features.Text())
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (row, picture) in enumerate(zip(rows(count), pictures(count, side), strict=True)):
                yield i, {**row, "image": encode(i, picture)}

    tfds.display_progress_bar(False)
    builder = Pictures(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return dict(name="pictures", split="train", data_dir=str(folder))
