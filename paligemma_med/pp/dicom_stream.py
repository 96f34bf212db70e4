"""What a compressed frame of a DICOM file says of itself: its size, its colours.

Headers are easily wrong after a file was compressed by another program than the one that wrote it, and
a stranger can make them differ on purpose: the frame is what gets decoded.
"""

import math
import re
import struct
from typing import NamedTuple

_J2K_SIZE = re.compile(rb"\xff\x4f\xff\x51.{4}(.{16})", re.DOTALL)  # SOC, SIZ, its length and profile


class Stream(NamedTuple):
    """A frame's own account; `None` and "" where it gives none.

    Attributes:
      size: (height, width) in pixels.
      colours: "RGB" or "YBR".
    """

    size: tuple[int, int] | None = None
    colours: str = ""


def read(frame: bytes) -> Stream:
    """Reads the head of a JPEG (also lossless and JPEG-LS) or JPEG 2000 stream."""
    if frame[:2] == b"\xff\xd8":
        return _jpeg(frame)
    # A JP2 file around the stream can hold other things that look like one: the largest counts.
    sizes = [struct.unpack(">IIII", found[1]) for found in _J2K_SIZE.finditer(frame)]
    return Stream(
        max(((bottom - top, right - left) for right, bottom, left, top in sizes), key=math.prod, default=None)
    )


def _jpeg(frame: bytes) -> Stream:
    """Colours are told by Adobe's or JFIF's marker, by letters as names of components, or by colours stored at
    a lower resolution than the brightness, which makes no sense for RGB."""
    at, told = 2, ""
    while 2 <= (at := frame.find(b"\xff", at)) <= len(frame) - 4:  # decoders skip what stands between segments
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        segment = frame[at + 4 : at + 2 + length]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # no segment follows
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xEE and segment[:5] == b"Adobe" and len(segment) >= 12:
            told = {0: "RGB", 1: "YBR"}.get(segment[11], "")
        elif marker == 0xE0 and segment[:4] == b"JFIF":
            told = told or "YBR"
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) or marker == 0xF7:
            size = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            names, sampling = segment[6::3], {*segment[7::3]}
            if names.lower() == b"rgb":
                told = "RGB"
            elif len(sampling) > 1:
                told = told or "YBR"
            return Stream(size if all(size) else None, told if len(names) == 3 else "")
        elif marker == 0xDA:
            break
        at += 2 + length
    return Stream()
