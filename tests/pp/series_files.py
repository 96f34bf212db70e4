"""Folders of small DICOM slices for tests, each with its own grey and a white left edge."""

import numpy as np

from tests.pp.dicom_files import make

AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)


def one_slice(grey, shape=(4, 6), **elements):
    """Bytes of a slice whose values are `grey`, but 255 in its first column (the picture's left)."""
    pixels = np.full(shape, grey, np.uint8)
    pixels[:, 0] = 255
    elements = dict(PatientID="p1", SeriesInstanceUID="1.2.3", SeriesNumber=7) | elements
    return make(pixels, bits=8, **{k: v for k, v in elements.items() if v is not None})


def write_series(folder, count=5, name="{i}.dcm", axis=AXIAL, step=(0, 0, 2.5), **elements):
    """Slices of grey 10, 20, … at 0, 1, … steps, in files whose names say nothing of it."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(count).tolist()
    for place in range(count):
        where = [float(place * x) for x in step]
        content = one_slice(
            10 * (place + 1),
            ImagePositionPatient=where,
            ImageOrientationPatient=list(map(float, axis)),
            **elements,
        )
        (folder / name.format(i=order[place])).write_bytes(content)
    return folder
