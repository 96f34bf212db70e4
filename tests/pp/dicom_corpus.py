"""What the house's reader and pydicom make of every DICOM file below some folders: a JSON line a file.

    python -m tests.pp.dicom_corpus FOLDER…

A program of its own, since pydicom looks for decoders when it is imported: `test_dicom_corpus` starts it
with those that it has installed. The comparison follows pydicom.pixels.processing and knows none of
the house's rules for broken files; where those apply, the two differ, and the test says which files they are.
"""

import hashlib
import io
import json
import logging
import pathlib
import sys
import warnings

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, apply_windowing, pixel_array

from paligemma_med.pp import dicom, images


def wanted(content: bytes) -> np.ndarray | None:
    """float[H, W] or [H, W, 3] in 0..255 as pydicom's functions give it; None without pixels.

    Raises whatever pydicom raises.
    """
    ds = pydicom.dcmread(io.BytesIO(content), force=True)
    if "PixelData" not in ds:
        return None
    if "TransferSyntaxUID" not in ds.file_meta:
        implicit, little = ds.original_encoding
        uid = pydicom.uid
        plain = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        ds.file_meta.TransferSyntaxUID = plain if little else uid.ExplicitVRBigEndian
    lossy = pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGExtended12Bit
    plugin = "pillow" if ds.file_meta.TransferSyntaxUID in lossy and ds.BitsStored == 8 else ""
    values = pixel_array(ds, index=0, decoding_plugin=plugin)
    if values.ndim == 3:
        return values / (2**ds.BitsStored - 1) * 255
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(values, ds)
        return colours / np.iinfo(colours.dtype).max * 255
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for item in ds.get(groups) or ():
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for elements in item.get(macro) or ():
                    for element in elements:
                        ds[element.tag] = element
            break
    x = apply_modality_lut(values, ds).astype(np.float64)
    if ds.get("WindowWidth") is not None and "WindowCenter" in ds:
        if "ModalityLUTSequence" in ds:
            ds.PixelRepresentation, ds.BitsStored = 0, 16
        low, high = (-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1)
        if ds.PixelRepresentation == 0:
            low, high = 0, 2**ds.BitsStored - 1
        if "RescaleSlope" in ds and "ModalityLUTSequence" not in ds:
            low, high = (end * ds.RescaleSlope + ds.RescaleIntercept for end in (low, high))
        y = (apply_windowing(x, ds) - float(low)) / float(high - low)
    elif ds.get("VOILUTSequence"):
        y = apply_voi(x.astype(np.int64), ds) / (2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1)
    elif ds.BitsStored <= 8 and "RescaleSlope" not in ds:
        y = x / (2**ds.BitsStored - 1)
    else:
        y = (x - x.min()) / (x.max() - x.min() or 1)
    return (1 - y if ds.PhotometricInterpretation == "MONOCHROME1" else y) * 255


def compare(path: pathlib.Path) -> dict:
    """What is made of a file.

    Returns:
      shape, notes, digest of the pixels and a few of them (thumb), or the error; reference: the error of pydicom's
      functions; difference from them: the largest, in grey levels.
    """
    content, out = path.read_bytes(), {"dicom": False}
    try:
        out["dicom"] = dicom.is_dicom(content)
        found = images.decode(content)
        height, width = found.rgb.shape[:2]
        out |= {
            "shape": found.rgb.shape,
            "notes": found.notes,
            "digest": hashlib.sha256(found.rgb.tobytes()).hexdigest(),
        }
        out["thumb"] = found.rgb[height // 20 :: height // 10 + 1, width // 20 :: width // 10 + 1].tolist()
    except ValueError as e:
        out["error"] = f"{e}"
    try:
        reference = wanted(content)
    except Exception as e:
        return out | {"reference": " ".join(f"{type(e).__name__}: {e}".split())[:300]}
    if reference is None:
        return out | {"reference": "no pixels"}
    if "shape" in out:
        reference = np.repeat(reference[..., None], 3, -1) if reference.ndim == 2 else reference
        out["difference"] = float(np.abs(found.rgb - np.clip(reference, 0, 255)).max())
    return out


def main(folders: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    for folder in map(pathlib.Path, folders):
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if path.suffix not in (".py", ".pyc", ".txt", ".TXT", ".json", ".gz", ".rst", ".dump", ".icc"):
                print(json.dumps({"file": path.relative_to(folder).as_posix(), **compare(path)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
