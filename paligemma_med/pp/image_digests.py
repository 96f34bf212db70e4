"""image_digests.tsv beside a built data set: what identifies each image's content, to compare two sets at once.

The builds write it, training reads it: it is a few bytes an image, where the records are gigabytes. A line is
split, the first 16 bytes of the SHA-256 of the stored image in hexadecimal digits, and one image_id that it goes by.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

NAME = "image_digests.tsv"
_LINE = re.compile(r"([^\t]+)\t([0-9a-f]{32})\t([^\t]*)")


def digest(content: bytes) -> str:
    """What identifies an image's bytes: 32 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def to_text(splits: Mapping[str, Mapping[str, str]]) -> str:
    """The file's text of {split: {digest: image_id}}; blanks of any kind within an id become spaces."""
    lines = (
        f"{split}\t{key}\t{' '.join(i.split())}\n" for split, images in splits.items() for key, i in images.items()
    )
    return "".join(lines)


def read(folder: os.PathLike | str) -> dict[str, dict[str, str]] | None:
    """{split: {digest: image_id}} of a built set; None where the build wrote none, as those before this file existed.

    Raises:
      ValueError: names the file and a line of another form.
    """
    path = pathlib.Path(folder) / NAME
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ValueError(f"{path}: can't be read ({e.strerror or e})") from None
    found: dict[str, dict[str, str]] = {}
    for number, line in enumerate(content.split("\n"), 1):
        if not line:
            continue
        if not (m := _LINE.fullmatch(line)):
            raise ValueError(
                f"{path} line {number}: found {line!r:.60}; expected split, digest and image_id between tabs"
            )
        found.setdefault(m[1], {})[m[2]] = m[3]
    return found


def of_split(splits: Mapping[str, Mapping[str, str]], spec: str) -> dict[str, str]:
    """{digest: image_id} of a split as configs name it, such as "train[:512]+validate": of the whole splits in it."""
    names = [re.sub(r"\[.*", "", part).strip() for part in spec.split("+")]
    wanted: Iterable[str] = splits if "all" in names else names
    return {key: i for name in wanted for key, i in splits.get(name, {}).items()}
