"""Build a data set for TFDS, from files on this machine; nothing is downloaded.

Example:
  python -m data_prep.build slake --manual_dir ~/data/Slake1.0 --data_dir ~/tensorflow_datasets
  python -m data_prep.build phantom --data_dir /tmp/data
  python -m data_prep.build slake --file_format=tfrecord --manual_dir … --data_dir ~/tfrecord
"""
# The docstring above is what --help prints.
#
# A build is written to DATA_DIR/.building and renamed into place when it is complete: a killed or
# failed build leaves the data sets as they were, even with --overwrite. A lock on that folder makes a
# second build of the same set wait, and lets the next one clean up after a killed one.

import contextlib
import fcntl
import importlib
import io
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags, logging

from data_prep import datasets, files
from data_prep import report as report_lib
from data_prep.builders import tfrecord
from data_prep.builders.vqa import REPORT_NAME, Option
from data_prep.files import DataError
from data_prep.leakage import records
from paligemma_med.pp import command_line
from paligemma_med.pp.files import default_data_dir

# Name -> module with a `Builder` (a VqaBuilder): each folder of datasets/ that has one. A module that
# also has `make_raw(folder, ...)` makes its own raw files.
BUILDERS = {
    path.parent.name: f"data_prep.datasets.{path.parent.name}.{path.stem}"
    for path in sorted(pathlib.Path(datasets.__file__).parent.glob("*/*_dataset_builder.py"))
}


@contextlib.contextmanager
def _staging(data_dir: pathlib.Path, key: str) -> Iterator[pathlib.Path]:
    """An empty folder below `data_dir` that only this process uses; removed afterwards."""
    try:
        parent = data_dir / ".building"
        parent.mkdir(parents=True, exist_ok=True)
        lock = open(parent / f"{key}.lock", "w")
    except OSError as e:
        raise DataError(f"{data_dir}: can't write there ({e.strerror or e})") from None
    with lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting: another build of {key} is running", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        staging = parent / key
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: pathlib.Path, data_dir: pathlib.Path, made: pathlib.Path) -> pathlib.Path:
    """Moves the finished `made` (below `staging`) to the same place below `data_dir`."""
    final = data_dir / made.relative_to(staging)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(staging / "replaced")
    made.rename(final)
    # TFDS notes a data set's default config at <data_dir>/<name>/.config.
    name = made.relative_to(staging).parts[0]
    common = staging / name / ".config"
    if common.is_dir():
        shutil.copytree(common, data_dir / name / ".config", dirs_exist_ok=True)
    return final


def _already_built(
    full_name: str,
    final: pathlib.Path,
    made_with: Mapping[str, Any],
    defaults: Mapping[str, Any],
    file_format: str,
) -> bool:
    """Whether the set is built already; DataError if it was built with other settings."""
    info_path = final / "dataset_info.json"
    if not info_path.is_file():
        return False
    built = files.read_json(info_path).get("fileFormat")
    if built != file_format:
        raise DataError(
            f"{final}: already built as {built}, asked for file_format={file_format}; give "
            "another --data_dir, or --overwrite to replace it"
        )
    report_path = final / REPORT_NAME
    report = files.read_json(report_path) if report_path.is_file() else {}
    # A set built before an option existed counts as built with its default.
    found = {k: report.get("made_with", {}).get(k, defaults.get(k)) for k in made_with}
    if found != made_with:
        other = [k for k in made_with if found[k] != made_with[k]]
        raise DataError(
            f"{final}: already built with {_settings(found, other)}, asked for "
            f"{_settings(made_with, other)}; pass --overwrite to build it again"
        )
    source = f" from {report['folder']}" if "folder" in report else ""
    print(f"{full_name} is already built at {final}{source}; --overwrite builds it again")
    return True


def _beam_options(arguments: Sequence[str] | None) -> Any:
    """Beam's options, None without Beam. DataError if it isn't installed."""
    if arguments is None:
        return None
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        raise DataError(f"--beam needs Apache Beam ({e}); pip install 'paligemma_med[beam]'") from None
    return PipelineOptions(list(arguments) or ["--runner=DirectRunner"])


def _settings(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{k}={values[k]}" for k in keys)


def _build_one(
    module: Any,
    config: str | None,
    manual_dir: pathlib.Path | None,
    data_dir: pathlib.Path,
    overwrite: bool,
    drawn_with: dict[str, Any],
    options: dict[str, Any],
    beam_options: Sequence[str] | None,
    file_format: str,
) -> pathlib.Path:
    # No file_format here: TFDS refuses a format that differs from an existing set's.
    settings = dict(config=config, options=options)
    builder = module.Builder(data_dir=data_dir, **settings)
    made_with = {**drawn_with, **builder.options}
    defaults = {k: o.default for k, o in builder.OPTIONS.items()}
    full_name, final = builder.info.full_name, pathlib.Path(builder.data_path)
    # Checked before taking the lock, which a read-only data_dir can't hold, and again afterwards.
    if not overwrite and _already_built(full_name, final, made_with, defaults, file_format):
        return final
    with _staging(data_dir, full_name.replace("/", "-")) as staging:
        if not overwrite and _already_built(full_name, final, made_with, defaults, file_format):
            return final
        start = time.monotonic()
        if manual_dir is None:
            manual_dir = module.make_raw(data_dir / "downloads" / builder.name, **drawn_with)
        print(f"building {full_name} from {manual_dir} ...", flush=True)
        builder = module.Builder(data_dir=staging, file_format=file_format, **settings)
        builder.cache_dir = data_dir / ".building" / f"{builder.name}-checked"
        builder.beam = beam_options is not None
        # TFDS prints the staging folder as if it were the result; its progress bars are on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_dir=staging / "downloads",
                download_config=tfds.download.DownloadConfig(
                    manual_dir=manual_dir,
                    try_download_gcs=False,
                    register_checksums=False,
                    beam_options=_beam_options(beam_options),
                ),
            )
        records.write_digests(pathlib.Path(builder.data_path))
        final = _publish(staging, data_dir, pathlib.Path(builder.data_path))
    for line in builder.describe(builder.report):
        print(f"  {line}")
    seconds = time.monotonic() - start
    print(f"built {full_name} at {final} in {seconds:.1f} s; counts in {REPORT_NAME} there")
    return final


def build(
    name: str,
    *,
    manual_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    config: str | None = None,
    overwrite: bool = False,
    num_images: Sequence[int] | None = None,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
    beam_options: Sequence[str] | None = None,
    report: str | os.PathLike | None = None,
    file_format: str = tfrecord.ARRAY_RECORD,
) -> dict[str, pathlib.Path]:
    """Builds one data set unless it is built already. Prints what it does.

    Args:
      name: a key of `BUILDERS`.
      manual_dir: folder with the released files. Drawn sets (phantom, shapes, shapes_easy, shapes_words) make their
        own if None.
      data_dir: where TFDS data sets are; None: `default_data_dir()`.
      config: one builder config; None: all that `manual_dir` has the files for.
      overwrite: build again even if it exists; the old set stays until the new one is complete.
      num_images: only for drawn sets: images in train, validate, test.
      seed: for drawing, or for whatever else the builder draws at random.
      options: values of the builder's `OPTIONS`; missing ones have their default.
      beam_options: None: no Beam. Otherwise the arguments of its pipeline, such as
        ["--runner=FlinkRunner"]; [] runs it on this machine.
      report: folder for a `data_prep.report` of the sets, newly built or not.
      file_format: "array_record", which this project reads, or "tfrecord", for `tf.data` and
        big_vision: the same records in the same order. A data_dir holds a set in only one format.

    Returns:
      {"slake/en": folder of the records, ...} (the name alone for a data set without configs).

    Raises:
      DataError: unknown name or config, or bad input; the message names the file.
    """
    if name not in BUILDERS:
        raise DataError(f"unknown data set {name!r}; known ones: {', '.join(sorted(BUILDERS))}")
    module = importlib.import_module(BUILDERS[name])
    own = hasattr(module, "make_raw")
    options = dict(options or {})
    if "seed" in module.Builder.OPTIONS and seed is not None:
        options["seed"], seed = seed, None
    if unknown := [k for k in options if k not in module.Builder.OPTIONS]:
        known = ", ".join(module.Builder.OPTIONS) or "none"
        raise DataError(f"{name}: unknown option {', '.join(unknown)}; its options: {known}")
    if file_format not in tfrecord.FORMATS:
        raise DataError(f"{name}: unknown file_format {file_format!r}; known ones: {', '.join(tfrecord.FORMATS)}")
    if file_format == tfrecord.TFRECORD:
        tfrecord.check_installed()
        if report is not None:
            raise DataError(f"{name}: a report is made of array_record files, not of tfrecord")
    if report is not None:
        report_lib.check_installed()
    if beam_options is not None:
        if not module.Builder.CAN_BEAM:
            raise DataError(f"{name}: small enough to be built without --beam, which it doesn't support")
        _beam_options(beam_options)  # fails now if it isn't installed
    if not own and (num_images is not None or seed is not None):
        raise DataError(
            f"{name}: num_images and seed are for drawn data sets (phantom, shapes, shapes_easy, shapes_words) only"
        )
    if manual_dir is not None and (num_images is not None or seed is not None):
        raise DataError(f"{name}: num_images and seed are for drawing, not with a manual_dir")
    if not own and manual_dir is None:
        raise DataError(f"{name}: --manual_dir is needed. {module.Builder.MANUAL_DOWNLOAD_INSTRUCTIONS}")
    if manual_dir is not None:
        manual_dir = module.Builder.check_manual_dir(manual_dir)
    configs = list(module.Builder.builder_configs) or [None]
    if config is not None:
        if config not in configs:
            known = ", ".join(c for c in configs if c) or "none"
            raise DataError(f"{name}: unknown config {config!r}; known ones: {known}")
        configs = [config]
    elif manual_dir is not None and configs != [None]:
        there = module.Builder.configs_in(manual_dir)
        if left := [c for c in configs if c not in there]:
            print(f"{name}: {manual_dir} has no files for config {', '.join(left)}", flush=True)
        configs = [c for c in configs if c in there]
    data_dir = pathlib.Path(data_dir).expanduser() if data_dir else default_data_dir()
    drawn_with = {"num_images": list(num_images) if num_images is not None else None, "seed": seed}
    drawn_with = {k: v for k, v in drawn_with.items() if v is not None}
    made = {
        f"{name}/{c}" if c else name: _build_one(
            module,
            c,
            manual_dir,
            data_dir,
            overwrite,
            drawn_with,
            options,
            beam_options,
            file_format,
        )
        for c in configs
    }
    shutil.rmtree(data_dir / ".building" / f"{name}-checked", ignore_errors=True)
    if report is not None:
        report_lib.write(report, made)
        print(f"report.md, report.json and distributions.png are in {report}")
    return made


def _options() -> dict[str, tuple[Option, list[str]]]:
    """All builders' options by name, with the data sets that have them, except `seed`, which has a flag."""
    found: dict[str, tuple[Option, list[str]]] = {}
    for name, module in BUILDERS.items():
        for key, option in importlib.import_module(module).Builder.OPTIONS.items():
            if key != "seed":
                found.setdefault(key, (option, []))[1].append(name)
    return found


def _define_flags() -> None:
    # Not on import: other programs import `build` and define their own --data_dir.
    command_line.define_path("manual_dir", None, "Folder with the released files (unpacked).")
    command_line.define_path("data_dir", None, "Where TFDS data sets are; $TFDS_DATA_DIR or ~/tensorflow_datasets.")
    flags.DEFINE_string("config", None, "One config, such as en; all of them if not given.")
    flags.DEFINE_enum(
        "file_format",
        tfrecord.ARRAY_RECORD,
        list(tfrecord.FORMATS),
        "tfrecord is for big_vision's TensorFlow readers.",
    )
    flags.DEFINE_bool("overwrite", False, "Build again what is built already.")
    flags.DEFINE_list("num_images", None, "For drawn sets: number of images in train,validate,test.")
    flags.DEFINE_integer("seed", None, "Seed of drawings, or of other random choices of a data set.")
    flags.DEFINE_bool("beam", False, "Build with Apache Beam (extra `beam`), for large sets.")
    flags.DEFINE_list(
        "beam_options",
        None,
        "With --beam: arguments of the pipeline, such as --runner=FlinkRunner.",
    )
    command_line.define_path("report", None, "Folder for a report of what is built (extra `report`).")
    # None means that an option wasn't given, which matters for data sets that don't have it.
    for key, (option, names) in _options().items():
        kinds = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
        define = kinds.get(type(option.default), flags.DEFINE_string)
        default = "" if option.default is None else f" Default: {option.default}."
        define(key, None, f"{', '.join(names)}: {option.help}{default}")


def main(argv: Sequence[str]) -> None:
    """Command line; exits with 1 and one line on bad input."""
    logging.set_verbosity(logging.WARNING)  # TFDS logs every file it writes
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        if len(argv) != 2:
            raise DataError(
                f"expected one data set name, found {list(argv[1:])}; known ones: "
                f"{', '.join(sorted(BUILDERS))}; --help shows an example"
            )
        num_images = flags.FLAGS.num_images
        if num_images is not None:
            if len(num_images) != 3 or not all(re.fullmatch("[0-9]{1,9}", n.strip()) for n in num_images):
                raise DataError(f"--num_images={','.join(num_images)}: expected 3 whole numbers")
            num_images = [int(n) for n in num_images]
        beam_options = flags.FLAGS.beam_options
        if beam_options is not None and not flags.FLAGS.beam:
            raise DataError("--beam_options: expected together with --beam")
        build(
            argv[1],
            manual_dir=flags.FLAGS.manual_dir,
            data_dir=flags.FLAGS.data_dir,
            config=flags.FLAGS.config,
            overwrite=flags.FLAGS.overwrite,
            num_images=num_images,
            seed=flags.FLAGS.seed,
            options={k: v for k in _options() if (v := flags.FLAGS[k].value) is not None},
            beam_options=(beam_options or []) if flags.FLAGS.beam else None,
            report=flags.FLAGS.report,
            file_format=flags.FLAGS.file_format,
        )
    except (DataError, OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "No space left" not in str(e):  # of ArrayRecord's writer
            raise
        if command_line.reader_is_gone(e):
            sys.exit(141)
        sys.exit(f"error: {files.told(e, flags.FLAGS.data_dir or default_data_dir())}")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=command_line.parse_flags)
