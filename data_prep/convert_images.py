"""Write images of any kind (DICOM, 16-bit, CMYK, …) as 8-bit JPEG or PNG files that models read.

Example:
  python -m data_prep.convert_images case17.dcm scans/ --output_dir=pngs

Files that every reader shows correctly are copied as they are; for the others .png is added to the
name (case17.dcm.png). Folders are searched recursively; files that aren't images are reported and left out.
"""
# The docstring above is what --help prints.

import os
import pathlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from absl import app, flags

from data_prep import files
from data_prep.files import DataError
from data_prep.images import convert as images
from data_prep.progress import progress
from paligemma_med.pp import command_line


def _inputs(paths: Iterable[str | os.PathLike]) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """(file, its path in the output folder) of all files; folders in the order of names."""
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                place = file.relative_to(path)
                if not any(part.startswith((".", "__MACOSX")) for part in place.parts):
                    yield file, place
        else:
            yield path, pathlib.Path(path.name)


def convert_files(
    paths: Sequence[str | os.PathLike], output_dir: str | os.PathLike
) -> tuple[int, list[str], list[str]]:
    """Converts files and folders into `output_dir`; see `images.convert` for the rules.

    Returns:
      How many files were written, a sentence for each that couldn't be, and one for each thing that was
      assumed or looks wrong in a file.

    Raises:
      DataError: two inputs would be written to the same file, or nothing can be written there.
    """
    output_dir, found, errors, told = pathlib.Path(output_dir), list(_inputs(paths)), [], []
    twice = [place for place, n in Counter(place for _, place in found).items() if n > 1]
    if twice:
        raise DataError(f"{twice[0]}: more than one input has this name; convert them apart")
    for file, place in progress(found, "images", len(found)):
        try:
            content = files.read_bytes(file, "an image")
            kept, notes = images.convert_noted(content, str(file))
        except DataError as e:
            errors.append(str(e))
            continue
        told += [f"{file}: {note}" for note in notes]
        out = output_dir / place
        if kept is not content:
            out = out.with_name(out.name + ".png")
        try:
            with files.whole_file(out) as f:
                f.write(kept)
        except OSError as e:
            raise DataError(f"{out}: can't be written ({e.strerror or e})") from None
    return len(found) - len(errors), errors, told


def main(argv: Sequence[str]) -> None:
    """Command line; exits with 1 if a file couldn't be converted."""
    try:
        if len(argv) < 2:
            raise DataError("no input; expected files or folders; --help shows an example")
        written, errors, notes = convert_files(argv[1:], flags.FLAGS.output_dir)
    except DataError as e:
        sys.exit(f"error: {e}")
    print(f"{written:,} images written to {flags.FLAGS.output_dir}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    command_line.define_path("output_dir", None, "Where the images go.")
    flags.mark_flag_as_required("output_dir")
    app.run(main, flags_parser=command_line.parse_flags)
