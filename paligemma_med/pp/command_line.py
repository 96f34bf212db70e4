"""What the command lines of all programs have in common: where programs and configs are, paths as flags, --help, and
output that any terminal takes.

It lives in `pp` because the programs of `data_prep` may import no other package of the library; `paligemma_med.cli` has
what those of a model share.
"""

import atexit
import csv
import functools
import io
import os
import re
import select
import sys
from collections.abc import Sequence

from absl import app, flags

_OURS = ("paligemma_med", "configs", "data_prep", "tools")

# Module of a program -> how its user calls it; empty unless `paligemma_med PROGRAM` did.
CALLED_AS: dict[str, str] = {}


def programs_folder() -> str:
    """The folder that has configs/, data_prep/ and tools/: that of the wheel, or the checkout."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    shipped = os.path.join(package, "_programs")
    return shipped if os.path.isdir(shipped) else os.path.dirname(package)


def as_called(text: str) -> str:
    """A text in which `python -m tools.report` is `paligemma_med report`, if this program was called in that way."""
    return re.sub(r"python -m ([\w.]*\w)", lambda m: CALLED_AS.get(m[1], m[0]), text)


def located(argv: Sequence[str]) -> list[str]:
    """The arguments with ~ in --config=~/x.py replaced, and configs/x.py by the installed file's name where the current
    folder has no such file."""
    return [_located(argument, before) for argument, before in zip(argv, ["", *argv])]


def _located(argument, before):
    flag, equals, value = argument.partition("=")
    if flag in ("--config", "-config") and equals:
        return f"{flag}={_located(value, '--config')}"
    if before not in ("--config", "-config"):
        return argument
    path, colon, rest = os.path.expanduser(argument).partition(":")
    shipped = os.path.join(programs_folder(), path)
    if not os.path.isabs(path) and not os.path.exists(path) and os.path.isfile(shipped):
        path = shipped
    return path + colon + rest


class _Path(flags.ArgumentParser):
    """A path, in which a leading ~ is the home folder: in --workdir=~/runs no shell replaces it."""

    def parse(self, argument: str) -> str:
        return os.path.expanduser(argument)

    def flag_type(self) -> str:
        return "path"


class _Paths(flags.ArgumentParser):
    """Paths with commas between them. One that exists may have commas; else such a one stands in quotes, as in CSV."""

    def parse(self, argument: str | Sequence[str]) -> list[str]:
        if not isinstance(argument, str):
            return [os.path.expanduser(path) for path in argument]
        whole = os.path.expanduser(argument)
        if os.path.exists(whole):
            return [whole]
        parts = next(csv.reader([argument], strict=True), [])
        return [os.path.expanduser(part.strip()) for part in parts]

    def flag_type(self) -> str:
        return "paths with commas between them"


class _PathsSerializer(flags.ArgumentSerializer):
    def serialize(self, value: Sequence[str]) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="").writerow(value)
        return out.getvalue()


def define_path(name: str, default: str | None, help: str, **kw) -> flags.FlagHolder:
    """Defines a flag that is a path, as `flags.DEFINE_string` would. kw: such as required=True."""
    return flags.DEFINE(_Path(), name, default, help, serializer=flags.ArgumentSerializer(), **kw)


def define_paths(name: str, default: Sequence[str] | None, help: str) -> None:
    """Defines a flag that is a list of paths."""
    flags.DEFINE(_Paths(), name, default, help, serializer=_PathsSerializer())


def define_choose() -> None:
    """Defines --choose, of programs that take an own table."""
    flags.DEFINE_string(
        "choose",
        None,
        "What is shown of folders of slices and files of several frames where the table doesn't say it, such as "
        "'slice=middle' or 'montage=2x4|window=brain' (docs/images.md).",
    )


def prepare_output() -> None:
    """Lets a program print whatever it has, for as long as somebody reads it.

    A character that the terminal's encoding lacks (PYTHONIOENCODING=ascii) or that isn't in UTF-8 is printed as an
    escape, where Python would end the program; and the end of a reader, as in `… | head`, is no traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    atexit.unregister(_leave_readers)
    atexit.register(_leave_readers)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _except_gone_readers


def define_choices() -> None:
    """Defines --choices, of programs that ask about an image whose questions no table holds."""
    flags.DEFINE_string(
        "choices",
        None,
        "What the question offers, for a run whose prompt shows it, such as stage 2 on PMC-VQA: "
        "'Liver|Spleen|Left kidney|Heart', in the order A, B, C, D.",
    )


def prepare() -> None:
    """To be called before flags are parsed: `prepare_output`; and --help lists all flags of the program, those that it
    defines through functions of other modules included, names the program as it was called, and ends with status 0.
    """
    prepare_output()
    program = sys.modules["__main__"]
    program.__doc__ = as_called(program.__doc__ or "") or None
    for name in ("help", "helpshort", "helpfull", "helpxml"):
        if name in flags.FLAGS and not isinstance(flags.FLAGS[name].parse, functools.partial):
            flags.FLAGS[name].parse = functools.partial(_help, flags.FLAGS[name].parse)
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.partition(".")[0] in _OURS:
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _help(show, argument):
    """What a flag such as --help does when it is parsed; absl ends with status 1, as after a mistake."""
    try:
        show(argument)
    except (SystemExit, BrokenPipeError):
        sys.exit(0)


def reader_is_gone(error: BaseException) -> bool:
    """Whether an error is that nobody reads what the program prints, as behind `| head`. If so, it prints no more."""
    return isinstance(error, BrokenPipeError) and _leave_readers()


def _leave_readers():
    """Writes what waits to be printed; where nobody reads it, to nowhere, or Python complains at its end."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            gone = _hung_up(stream.fileno())  # an unbuffered stream has nothing to flush
        except BrokenPipeError:
            gone = True
        except (AttributeError, ValueError, OSError):  # None (without a console), closed already, or no file
            continue
        if gone:
            found = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return found


def _hung_up(descriptor):
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _except_gone_readers(kind, error, trace):
    if not reader_is_gone(error):
        sys.__excepthook__(kind, error, trace)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """For `app.run(main, flags_parser=…)` of a program without --config: absl's own parser, after `prepare`."""
    prepare()
    return app.parse_flags_with_usage(located(argv))
