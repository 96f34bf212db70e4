"""Small DICOM files for tests."""

import io

import numpy as np
import PIL.Image
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from paligemma_med.pp import dicom


def make(pixels, *, bits=16, kind="MONOCHROME2", preamble=True, syntax=ExplicitVRLittleEndian, frame=None, **elements):
    """Bytes of a DICOM file.

    Args:
      pixels: [H, W], [frames, H, W] or, for colours, [H, W, 3].
      frame: bytes of the compressed frame, or a list of them, if `syntax` is a compressed one.
      **elements: values or DataElements, by keyword; None leaves one empty.
    """
    pixels = np.asarray(pixels)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    little = syntax != ExplicitVRBigEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128 if preamble else None, is_little_endian=little)
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    ds.PatientName = "Doe^Jane"
    colour = kind in ("RGB", "YBR_FULL")
    ds.SamplesPerPixel = 3 if colour else 1
    if colour:
        ds.PlanarConfiguration = 0
    shape = pixels.shape[:-1] if colour else pixels.shape
    if len(shape) == 3:
        ds.NumberOfFrames = shape[0]
    ds.Rows, ds.Columns = shape[-2:]
    ds.PhotometricInterpretation = kind
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    ds.BitsStored, ds.HighBit = bits, bits - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        _put(ds, name, value)
    if frame is None:
        data = pixels.astype(pixels.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
        ds.PixelData = data + b"\0" * (len(data) % 2)
        ds["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    else:
        ds.PixelData = encapsulate([frame] if isinstance(frame, bytes) else frame)
        ds["PixelData"].VR = "OB"
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=preamble)
    return out.getvalue()


def _put(ds, name, value):
    if isinstance(value, DataElement):
        ds.add(value)
    else:
        setattr(ds, name, value)


def items(*sequences):
    """One sequence of the items of several."""
    return Sequence([one for sequence in sequences for one in sequence])


def without_meta(content):
    """The same file without preamble and without its group 0002, as some archives send it."""
    length = int.from_bytes(content[140:144], "little")
    return content[144 + length :]


def item(**elements):
    """A data set with these elements, in a sequence."""
    ds = Dataset()
    for name, value in elements.items():
        _put(ds, name, value)
    return Sequence([ds])


def table(entries, bits=8, first=0, vr="US"):
    """A lookup table in a sequence."""
    ds = Dataset()
    ds.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    ds.add_new("LUTData", vr, entries if vr == "US" else np.array(entries, "<u2").tobytes())
    ds.ModalityLUTType = "US"
    return Sequence([ds])


def jpeg(pixels, **options):
    """A JPEG stream of uint8[H, W, 3], as PIL writes it: YCbCr, with JFIF's marker."""
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "JPEG", quality=95, **options)
    return out.getvalue() + b"\0" * (out.tell() % 2)


def grey(content):
    """The grey levels of a DICOM file, as lists."""
    rgb = dicom.to_rgb(content)
    assert rgb.dtype == np.uint8 and rgb.shape[2] == 3
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0].tolist()
