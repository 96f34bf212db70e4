"""What a command line is: mistakes told in one sentence, exit codes, and the flags that programs share.

Every program's `main` is wrapped in `command`, and its `app.run` is given `parse_flags`. Importing this
file needs no JAX, since many tools need none.
"""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from paligemma_med.config import stand_ins
from paligemma_med.parallel import ending
from paligemma_med.pp import command_line


def command(main) -> Callable:
    """`main` of a program, so wrapped that mistakes which its user can mend are told in one sentence.

    With --verbosity=1 they keep their traceback, and libraries log what they do.
    """

    @functools.wraps(main)
    def run(argv):
        is_verbose = flags.FLAGS["verbosity"].present
        if not is_verbose:
            logging.set_verbosity(logging.WARNING)  # Orbax logs every move of its own at INFO.
            logging.get_absl_logger().addFilter(_is_news)
        _lift_guards()
        try:
            main(argv)
        except app.UsageError as e:
            # absl would print the whole help above it.
            ending.leave(f"error: {str(e).rstrip('.')}. --help names all flags.")
        except KeyboardInterrupt as e:
            code = getattr(e, "exit_code", None)
            if code is not None and not ending.is_alone():  # all processes have agreed to stop
                sys.exit(code)
            ending.leave_at_once(code or 130)
        except Exception as e:
            if command_line.reader_is_gone(e):
                ending.leave(141)  # as a shell says it of a program that SIGPIPE ended
            known = isinstance(e, ValueError | OSError | FloatingPointError)
            sentence = _of_machine(e) or (_told(e) if known else None)
            if ending.tell_if_peer_lost(e):
                ending.leave(1)
            if (is_verbose and flags.FLAGS.verbosity > 0) or sentence is None:
                if ending.is_alone():
                    raise
                traceback.print_exc()
                ending.leave(1)
            ending.leave(f"error: {_shown(command_line.as_called(sentence))}")

    return run


def _is_news(record):
    """False for the traceback that a thread of Orbax logs of a save that fails: the error is raised as well."""
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


def _told(error):
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _shown(text):
    """A message, each line of which fits a few lines of a terminal: it may quote what a file holds."""
    lines = text.split("\n")
    return "\n".join(x if len(x) <= 1000 else f"{x[:700]} … {x[-250:]}" for x in lines)


_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)  # as XLA says it
_BYTES = re.compile(r"(\d{4,}) bytes")
_LESS_MEMORY = (
    "Fewer examples at a time (train: a larger config.grad_accum_steps, or micro=… of a config that has it; evaluate: "
    "batch_size in config.evals) and frozen weights in fewer bits (config.frozen_dtype='bfloat16', 'int8' or 'nf4') "
    "need less; train --dry_run says how much a run needs."
)


def is_out_of_memory(error) -> bool:
    """Whether an error of JAX's or numpy's says that there is no more memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(" ".join(str(error).split())))
    )


def _of_machine(error):
    """One sentence on an error of JAX's or numpy's that a user can do something about: no more memory, or devices that
    aren't there. None for any other."""
    said = " ".join(str(error).split())
    if is_out_of_memory(error):
        said = said.removeprefix("RESOURCE_EXHAUSTED: ") or "no more memory"
        said = _BYTES.sub(lambda m: f"{int(m[1]) / 2**30:.3g} GiB", said.split(". ")[0].rstrip(".")[:200])
        advice = f" {_LESS_MEMORY}" if "config" in flags.FLAGS else ""
        return f"this machine's or device's memory doesn't suffice ({said}).{advice}"
    if isinstance(error, RuntimeError | AssertionError) and not _has_devices():
        wanted = os.environ.get("JAX_PLATFORMS")
        return (
            (f"JAX_PLATFORMS={wanted} asks for devices that aren't here" if wanted else "JAX finds no devices")
            + (f" ({said[:200].rstrip('. ')}): " if said else ": ")
            + ("unset it to take what is there, or " if wanted else "")
            + "install JAX with the plug-in for them (such as jax[cuda12]) and their driver."
        )
    return None


def _has_devices():
    """Whether JAX has devices to compute on, or wasn't imported. Its errors don't tell: without a plug-in for them,
    JAX_PLATFORMS=cuda is an AssertionError without a word."""
    try:
        return "jax" not in sys.modules or bool(sys.modules["jax"].devices())
    except Exception:
        return False


# What a user may have set for code of their own, and the value with which Optax and Orbax run.
_GUARDS = {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
_GUARDS |= {
    f"jax_transfer_guard{way}": "allow" for way in ("", "_host_to_device", "_device_to_device", "_device_to_host")
}


def _lift_guards():
    """Leaves aside JAX's guards (JAX_NUMPY_DTYPE_PROMOTION=strict, JAX_TRANSFER_GUARD=disallow, …), and says so."""
    jax = sys.modules.get("jax")
    for name, needed in _GUARDS.items() if jax else ():
        if (found := getattr(jax.config, name)) not in (None, needed):
            jax.config.update(name, needed)
            print(f"{name.upper()}={found} is left aside: not all libraries used here stand it.", file=sys.stderr)


def parse_flags(argv) -> list[str]:
    """The programs' `app.run(…, flags_parser=parse_flags)`: one line on a wrong --config=… or --config.key=…, for
    which absl and ml_collections show a traceback. As `command_line.parse_flags`, it prepares output and --help.

    With --workdir=RUN (or a run as --checkpoint) and without --config, --config.key=value changes the run's own config.
    """
    command_line.prepare()
    if is_changed_run(argv):
        # Where config_flags looks for the values of --config.key.
        sys.argv = argv = [argv[0], f"--config={_OF_RUN}:{_run_of(argv)}", *argv[1:]]
    argv = command_line.located(argv)
    try:
        with stand_ins.importable(_config_file(argv)):
            return flags.FLAGS(argv)
    except flags.Error as e:
        # What get_config raised stands at the end of its traceback.
        last = str(e).strip().splitlines()[-1].strip()
        sys.exit(f"error: {last.removeprefix('ValueError: ') if 'Traceback' in str(e) else e}")
    except ImportError as e:  # of the config file
        sys.exit(f"error: {e}")
    except (AttributeError, KeyError) as e:
        paths = [a.partition("=")[0] for a in argv if a.startswith("--config.")]
        named = [p for p in paths if set(p.split(".")[1:]) & set(re.findall(r"\w+", str(e)))]
        near = re.search(r'Did you mean "(\w+)"', str(e))
        sys.exit(
            f"error: {named[0] if named else '--config.…'}: the config has no such key"
            + (f" (did you mean {near[1]!r}?)" if near else "")
            + ". Flags change only what its file sets; mend the name, or add the key to the file."
        )


_OF_RUN = os.path.join(os.path.dirname(stand_ins.__file__), "of_run.py")


def is_changed_run(argv=None) -> bool:
    """Whether a command line (default: this program's) changes the config of a run."""
    argv = sys.argv if argv is None else argv
    file = _config_file(argv)
    has_changes = any(re.match(r"--?(no)?config\.", flag) for flag in argv)
    return has_changes and (file == _OF_RUN or file is None and _run_of(argv) is not None)


def _run_of(argv):
    """The folder of the run that a command line names; None if it names none."""
    if folder := _value_of("workdir", argv):
        return os.path.expanduser(folder)
    checkpoint = os.path.expanduser(_value_of("checkpoint", argv) or "")
    found = [checkpoint, checkpoint.rpartition("@")[0]]
    return next((folder for folder in found if folder and os.path.isfile(os.path.join(folder, "config.json"))), None)


def _config_file(argv):
    """The file that --config names, without its arguments; None if there is no such flag."""
    value = _value_of("config", argv)
    return None if value is None else value.partition(":")[0]


def _value_of(flag, argv):
    """The value of a flag before flags are parsed; None if it isn't given."""
    for argument, following in zip(argv, [*argv[1:], ""]):
        name, has_value, value = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            return value if has_value else following
    return None


def define_weight_flags() -> None:
    """--base, --resample_posemb, --allow_nonfinite, --download of programs that read weights: `with_weight_flags`."""
    command_line.define_path("base", None, "Where the weights are that a run started from, if they were moved since.")
    flags.DEFINE_bool("resample_posemb", False, "Resample position embeddings of weights of another resolution.")
    flags.DEFINE_bool("allow_nonfinite", False, "Take weights that are NaN or infinite as they are.")
    flags.DEFINE_bool("download", False, DOWNLOAD)


DOWNLOAD = "Fetch weights named as on the Hugging Face Hub (owner/name, hf:owner/name@revision) into its cache."


def with_weight_flags(config):
    """The config, or a copy with what those flags say; --download fetches what it names."""
    fetch(*(config.get(key) for key in ("model_init", "adapter_init", "base")), flags.FLAGS["base"].value)
    given = {key: flags.FLAGS[key].value for key in ("base", "resample_posemb", "allow_nonfinite")}
    if config.get("resample_posemb"):
        given.pop("resample_posemb")  # the config says by which method
    if not any(given.values()):
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update({key: value for key, value in given.items() if value})
    return config


def fetch(*specs) -> None:
    """With --download: has weights and adapters that are names on the Hugging Face Hub fetched into its cache."""
    if flags.FLAGS["download"].value:
        from paligemma_med.checkpoints import hub

        for spec in specs:
            hub.fetch(spec or None)


def define_source_flags() -> None:
    """--config, --workdir, --checkpoint, --adapter of the programs that answer questions; `from_flags`
    reads them.

    A function, so that only the program that runs defines them, not every module imported.
    """
    config_flags.DEFINE_config_file(
        "config", None, "Experiment; default: the workdir's own, in which --config.key=value changes a value."
    )
    command_line.define_path("workdir", None, "Folder of a run.")
    command_line.define_path(
        "checkpoint",
        None,
        "Weights of any form, or a run; default: the workdir's newest.",
    )
    command_line.define_path("adapter", None, "PEFT adapter directory to put on top of --checkpoint.")
    define_weight_flags()


def from_flags() -> tuple:
    """(config, checkpoint) that those flags name; UsageError if they don't suffice.

    A checkpoint that is a run brings its own config, as --workdir does.
    """
    values = flags.FLAGS
    folder = _folder_of_run()
    if folder is None and (values.config is None or values.checkpoint is None):
        raise app.UsageError("Give --workdir, or both --config and --checkpoint.")
    fetch(values.checkpoint)
    return config_from_flags(), values.checkpoint or values.workdir


def config_from_flags():
    """The config that those flags name, for what reads no weights; UsageError if they name none."""
    # Imported here: what opens a run brings Orbax and JAX, which programs without these flags don't need.
    from paligemma_med.checkpoints import workdir
    from paligemma_med.config import files as config_files

    values = flags.FLAGS
    folder = _folder_of_run()
    if folder is None and values.config is None:
        raise app.UsageError("Give --workdir or --config.")
    config = values.config or config_files.from_json(workdir.read_config(folder))
    if values.adapter:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.adapter_init, config.lora = values.adapter, None
    return with_weight_flags(config)


def _folder_of_run():
    """The folder of --workdir, or of a run that --checkpoint names; else None."""
    from paligemma_med.checkpoints import workdir

    values = flags.FLAGS
    run = workdir.split_spec(values.checkpoint) if values.checkpoint else None
    return values.workdir or (run[0] if run else None)


def define_chip_flags() -> None:
    """--dry_run and --chip of the programs that answer questions; `check_chip_flags`."""
    flags.DEFINE_bool("dry_run", False, "Compile on abstract arrays, print memory and what programs do, stop.")
    flags.DEFINE_string("chip", None, "--dry_run: compile for this chip, not for what is here: h200, v5e:4x4, …")


def check_chip_flags(*names) -> bool:
    """Whether one of these flags is given, --dry_run for one; UsageError for --chip without them."""
    values = flags.FLAGS
    if given := any(values[name].value for name in names):
        return given
    if values.chip is not None:
        raise app.UsageError(f"--chip is for {' and '.join(f'--{name}' for name in names)} alone.")
    return False
