"""From a data set on disk to batches on the devices: TFDS data source -> Grain -> `jax.Array`.

Records are read at random from TFDS's array_record files (no TensorFlow), shuffled anew each epoch,
preprocessed by a pp string, batched, and put on the mesh ahead of their use. Which rows a batch
holds, and the random numbers that pp draws for them, depend on nothing but the seed and the step:
not on threads, worker processes, the number of JAX processes, or where a run was resumed.

Worker processes (`num_workers` > 0) are started afresh ("spawn"), never forked from a process in
which JAX has threads. A program that asks for them must therefore guard its entry point
(`if __name__ == "__main__": app.run(main)`): each worker imports the main module again. They are
told to leave accelerators alone, and hand batches back through shared memory (`/dev/shm` must hold
a few batches; give docker `--shm-size`). With `num_workers=0` a few threads do the same work.

Faults: a record that can't be used ends the run, naming it, or with `on_error="skip"` gives way to
another and is listed. A worker that dies ends it within seconds. In an evaluation no question may
be skipped, and an error in one process is raised in all of them.
"""

import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import flags, logging
from ml_collections import ConfigDict

from paligemma_med import mixture
from paligemma_med.parallel import distributed
from paligemma_med.parallel import sharding as sharding_lib

PpFn = Callable[[dict[str, Any], np.random.Generator | None], dict[str, Any]]


class InputError(ValueError):
    """What is wrong with a data set, a record or an input config, in one sentence.

    It holds text alone, so that it comes back whole from a worker process.
    """


# --- Records on disk ---


def default_data_dir() -> pathlib.Path:
    """$TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _version_key(folder: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split("."))


def _find_version(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The folder of the highest version of `name` ("slake/en") that is built in `data_dir`."""
    parts = name.split("/")
    if not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts) or len(parts) > 2:
        raise InputError(f"data.name={name!r}: expected a name like 'phantom' or 'slake/en'")
    folder = data_dir.joinpath(*parts)
    inside = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    versions = [p for p in inside if re.fullmatch(r"\d+\.\d+\.\d+", p.name) and (p / "dataset_info.json").is_file()]
    if versions:
        return max(versions, key=_version_key)
    configs = sorted(f"{name}/{p.name}" for p in inside if any(p.glob("*/dataset_info.json")))
    if len(parts) == 1 and configs:
        raise InputError(f"data.name={name!r} has no data of its own; choose one of {configs}")
    config = f" --config {parts[1]}" if len(parts) == 2 else ""
    raise InputError(
        f"data set {name!r} is not built in {data_dir}; build it with "
        f"`python -m data_prep.build {parts[0]}{config} --data_dir {data_dir}` "
        "(and --manual_dir with the released files where they are needed), or point data.data_dir "
        "or $TFDS_DATA_DIR to where it is"
    )


def folder_of(data: Mapping[str, Any]) -> pathlib.Path:
    """The folder that `open_source` reads; InputError where the set isn't built."""
    data_dir = data.get("data_dir")
    data_dir = pathlib.Path(data_dir).expanduser() if data_dir else default_data_dir()
    return _find_version(str(data["name"]), data_dir)


def _to_numpy_and_text(value: Any, feature: Any) -> Any:
    """`value` with Text features as str and plain numbers as numpy; the rest is left alone."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {k: _to_numpy_and_text(v, feature[k]) for k, v in value.items()}
    if isinstance(feature, tfds.features.Sequence):
        return _to_numpy_and_text(value, feature.feature)
    if isinstance(feature, tfds.features.Text):
        # A Text inside a Sequence comes as a list.
        if isinstance(value, bytes):
            return value.decode("utf-8")
        return [_to_numpy_and_text(v, feature) for v in value]
    if isinstance(value, int | float):
        return feature.np_dtype.type(value)
    return value


class Source:
    """Random access to one split: `len(source)`, `source[i]` -> dict. Picklable.

    Encoded images come as the bytes of the file, text as str (also inside sequences), the rest as
    numpy. name, split, features: what was opened.
    """

    def __init__(self, name: str, split: str, builder: Any):
        self.name = name
        self.split = split
        self.features = builder.info.features
        images = [k for k, f in self.features.items() if isinstance(f, tfds.features.Image)]
        decoders = {k: tfds.decode.SkipDecoding() for k in images}
        self._records = builder.as_data_source(split, decoders=decoders)
        parts = [f for s in split.split("+") for f in _instructions(builder, s.strip())]
        self._about = {
            "name": name,
            "version": str(builder.version),
            "split": split,
            "examples": len(self._records),
            "bytes": sum(os.path.getsize(f.filename) for f in parts),
        }

    def __len__(self) -> int:
        return len(self._records)

    def about(self) -> dict[str, Any]:
        """What was opened: name, version, split, examples, and the size of the split's files."""
        return dict(self._about)

    def columns(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The records in order with these keys alone. Nothing else of them is decoded or held."""
        features = tfds.features.FeaturesDict({k: self.features[k] for k in keys})
        for i in range(len(self)):
            record = self._records.data_source[i]
            yield _to_numpy_and_text(features.deserialize_example_np(record), features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._records[int(index)]
        except Exception as e:
            # array_record gives a C++ status here: no file name in it, and no index.
            raise InputError(f"{self}, record {index}: can't be read: {e}") from e
        return _to_numpy_and_text(record, self.features)

    def __str__(self) -> str:
        return f"data set {self.name} split {self.split}"

    __repr__ = __str__


def open_source(data: Mapping[str, Any]) -> Source:
    """Opens `data = dict(name="slake/en", split="train[:512]", data_dir=...)`.

    The highest version built in data_dir (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets) is
    read, through its own description on disk: the builder's code isn't needed. `split` is TFDS's:
    slices in records or percent, and sums.
    InputError: not built (with the command that builds it), no such split, empty, files missing.
    """
    data = dict(data)
    unknown = sorted(set(data) - {"name", "split", "data_dir"})
    missing = sorted({"name", "split"} - set(data))
    if unknown or missing:
        raise InputError(
            f"input data {data}: expected the keys name, split and perhaps data_dir; "
            + (f"unknown: {unknown}" if unknown else f"missing: {missing}")
        )
    name, split = str(data["name"]), str(data["split"])
    folder = folder_of(data)
    builder = tfds.builder_from_directory(str(folder))
    splits = {k: info.num_examples for k, info in builder.info.splits.items()}
    for part in split.split("+"):
        if (match := re.match(r"\s*([\w.-]+)", part)) is None or match.group(1) not in splits:
            raise InputError(
                f"data set {name} has no split {part.strip()!r}; it has "
                + ", ".join(f"{k} ({n} examples)" for k, n in splits.items())
            )
    try:
        # Here a slice that can't be read ("train[:x]") is found out.
        instructions = [f for s in split.split("+") for f in _instructions(builder, s.strip())]
    except Exception as e:
        raise InputError(f"split {split!r} of data set {name} can't be read: {e}") from None
    if not sum(f.take for f in instructions):
        raise InputError(f"split {split!r} of data set {name} is empty; it has {splits}")
    for f in instructions:
        if not os.path.exists(f.filename):
            raise InputError(f"data set {name}: the file {f.filename} is missing, build it again")
    try:
        return Source(name, split, builder)
    except NotImplementedError:
        raise InputError(
            f"{folder} holds {builder.info.file_format.value} files, expected array_record, which "
            "`python -m data_prep.build` makes unless told otherwise; build it into another "
            "--data_dir, and point data.data_dir or $TFDS_DATA_DIR there"
        ) from None


def _instructions(builder: Any, split: str) -> list[Any]:
    return list(builder.info.splits[split].file_instructions)


# --- One row, one batch ---


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic | bool | int | float) and np.asarray(value).dtype.kind not in (
        "O",
        "S",
        "U",
        "M",
        "m",
    )


class Preprocess:
    """Applies pp to `(index, record)` and splits the result into what may go to a device or not.

    Gives (arrays, others, cut): key -> numpy, key -> anything else, tokens that `tolen` cut off.
    Keys that start with "_" are pp's bookkeeping and go no further.
    """

    def __init__(self, pp: str | PpFn, source: Any):
        if isinstance(pp, str):
            from paligemma_med.pp import get_preprocess_fn

            pp = get_preprocess_fn(pp)
        self._pp = pp
        self._source_text = str(source)

    def where(self, index: int, record: Mapping[str, Any]) -> str:
        question = f" (question_id {record['question_id']})" if "question_id" in record else ""
        return f"{self._source_text}, record {index}{question}"

    def __call__(
        self, item: tuple[int, dict[str, Any]], rng: np.random.Generator | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any], int]:
        index, record = item
        try:
            row = self._pp(record, rng)
        except (Exception, SystemExit) as e:  # SystemExit would end a thread without a word
            kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
            raise InputError(f"{self.where(index, record)}: pp failed: {kind}{e}") from e
        cut = int(row.get("_truncated", 0))
        row = {k: v for k, v in row.items() if not k.startswith("_")}
        arrays = {k: np.asarray(v) for k, v in row.items() if _is_array(v)}
        return arrays, {k: v for k, v in row.items() if k not in arrays}, cut


# So many records that fail one after another are no accident: it's the config, or the disk.
_TRIES = 10


class _TrainRow:
    """Place in a set -> (arrays, tokens cut off, records skipped on the way), for training.

    With on_error="skip", a record that can't be read or preprocessed gives way to another one of
    the set, drawn by the row's own random numbers: so batches still depend on seed and step alone.
    """

    def __init__(
        self,
        source: Source,
        pp: str | PpFn,
        *,
        name: str,
        in_mixture: bool,
        on_error: str,
        eos_token: int,
        allow_missing_eos: bool,
    ):
        self._source = source
        self._pp = Preprocess(pp, source)
        self._name = name
        self._prefix = f"{name}:" if in_mixture else ""
        self._skips = on_error == "skip"
        self._eos_token = eos_token
        self._allow_missing_eos = allow_missing_eos

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], int, list[dict[str, Any]]]:
        item, (arrays, others, cut), skipped = self._make(int(index), rng)
        if others:
            kept = ", ".join(f'"{k}"' for k in arrays)
            found = ", ".join(f"{k} ({type(v).__name__})" for k, v in others.items())
            raise InputError(
                f"input.pp leaves keys that are no arrays: {found}; add keep({kept}) at its end, or fewer of these"
            )
        if not self._allow_missing_eos:
            self._check_eos(arrays, cut, *item)
        return arrays, cut, skipped

    def _make(self, index: int, rng: np.random.Generator) -> tuple[Any, Any, list[dict[str, Any]]]:
        """((index, record), what pp makes of it, records skipped before it)."""
        skipped = []
        while True:
            record = {}
            try:
                record = self._source[index]
                return (index, record), self._pp((index, record), rng), skipped
            except InputError as e:
                # Memory that runs out is no fault of the record; skipping it would change the run.
                if not self._skips or isinstance(e.__cause__, MemoryError):
                    raise
                question_id = record.get("question_id")
                skipped.append(
                    {
                        "set": self._name,
                        "record": index,
                        "question_id": None if question_id is None else str(question_id),
                        "reason": str(e),
                    }
                )
            if len(skipped) == _TRIES:
                raise InputError(
                    f"input.on_error='skip', but {_TRIES} records drawn one after another can't be "
                    f"used; repair the data or input.pp: {skipped[0]['reason']}"
                )
            index = int(rng.integers(len(self._source)))

    def label(self, index: int, rng: np.random.Generator) -> str:
        """The question_id of the row made of the same arguments, or "train[17]" if it has none.

        In a mixture, the name of the set comes before it.
        """
        index = int(index)
        if self._skips:  # Only pp can tell whose place another record has taken.
            (index, _), _, _ = self._make(index, rng)
        try:
            label = self._source[index]["question_id"]
        except (InputError, KeyError):
            label = f"{self._source.split}[{index}]"
        return f"{self._prefix}{label}"

    def _check_eos(self, arrays: Mapping[str, np.ndarray], cut: int, index: int, record: Mapping[str, Any]) -> None:
        where = self._pp.where(index, record)
        if missing := [k for k in ("text", "mask_loss") if k not in arrays]:
            raise InputError(
                f"{where}: input.pp gives no {' and no '.join(missing)}, found {sorted(arrays)}; "
                "keep them, or set input.allow_missing_eos=True"
            )
        text, mask_loss = arrays["text"], arrays["mask_loss"]
        if text.shape != mask_loss.shape:
            raise InputError(
                f"{where}: text has shape {text.shape} and mask_loss {mask_loss.shape}, "
                "expected the same; give both to tolen"
            )
        if not np.any((mask_loss > 0) & (text == self._eos_token)):
            advice = (
                f"tolen cut {cut} tokens off, raise text_len (the length given to tolen, now {len(text)})"
                if cut
                else "add eos='yes' to the tok(...) of the suffix and supervise it with mask_loss"
            )
            raise InputError(
                f"{where}: no supervised EOS (token {self._eos_token} with mask_loss > 0), so the "
                f"model can't learn where the answer ends: {advice}, or set "
                "input.allow_missing_eos=True"
            )


def _train_batch(
    rows: Sequence[tuple[dict[str, np.ndarray], int, list[dict[str, Any]]]],
) -> tuple[dict[str, np.ndarray], np.ndarray, list[dict[str, Any]]]:
    arrays, cut, skipped = zip(*rows)
    return _stack(arrays), np.array(cut, np.int32), [one for row in skipped for one in row]


def _stack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of equal keys and shapes -> key -> array[len(rows), ...]."""
    for row in rows:
        if row.keys() != rows[0].keys():
            raise InputError(f"pp gives rows of one batch different keys: {sorted(rows[0])} and {sorted(row)}")
    out = {}
    for key in rows[0]:
        shapes = sorted({row[key].shape for row in rows})
        if len(shapes) > 1:
            raise InputError(
                f"pp gives rows of one batch different shapes of {key!r}: {shapes[:4]}; "
                "add tolen(...) for tokens, resize(...) for images"
            )
        out[key] = np.stack([row[key] for row in rows])
    return out


class _WithIndex:
    """A source whose items know their place, for errors: `[i]` -> (i, record)."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return int(index), self._source[index]


# --- Devices ---


def _sharding_of(mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding_lib.batch_sharding(mesh)


def _check_batch_size(batch_size: Any, mesh: jax.sharding.Mesh | None, what: str) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"{what}={batch_size!r}: expected a positive whole number")
    axis = sharding_lib.DATA_AXIS
    parts = 1 if mesh is None else sharding_lib.batch_sharding(mesh).mesh.shape[axis]
    if batch_size % parts:
        down = batch_size // parts * parts
        raise InputError(
            f"{what}={batch_size} doesn't divide by the {parts} shards of the mesh axis "
            f'"{axis}"; use {f"{down} or " if down else ""}{down + parts}'
        )
    return batch_size


def _process_share(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, int]:
    """(p, n): this process's devices need the p-th of n equal contiguous pieces of a batch.

    Read off the sharding, not the process index: the order of devices in a mesh is JAX's choice,
    and processes that differ only along another axis need the same rows.
    """
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = sorted({s[0].indices(batch_size)[:2] for s in slices})
    low, high = bounds[0][0], bounds[-1][1]
    size = high - low
    covered = sum(stop - start for start, stop in bounds)
    if covered != size or batch_size % size or low % size:
        raise InputError(
            f"the devices of this process hold rows {bounds} of a batch of {batch_size}, expected "
            'one contiguous piece; put the axis "data" first in config.mesh'
        )
    return low // size, batch_size // size


def _put(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, batch_size: int) -> dict[str, jax.Array]:
    return {
        k: jax.make_array_from_process_local_data(sharding, v, (batch_size, *v.shape[1:])) for k, v in batch.items()
    }


# --- Grain ---


# Seconds that a worker goes on after SIGTERM.
_LAST_BATCHES = 60


def _worker_init(index: int, count: int) -> None:
    del index, count
    # A worker imports the main module, and JAX with it; it must not take GPU memory or a TPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Ctrl-C reaches the whole group. The main process decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Schedulers send SIGTERM to all processes of a job. The main process may still need batches, to
    # come to the step after which it stops; it then ends its workers, or they end themselves.
    signal.signal(signal.SIGTERM, lambda *_: _start_daemon(_exit_later))
    # Grain ends workers when an iterator is closed; a main process that is killed closes nothing,
    # and its workers would wait for ever for room in their queues.
    _start_daemon(_exit_after_parent)


def _start_daemon(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()


def _exit_later() -> None:
    time.sleep(_LAST_BATCHES)
    os._exit(1)


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_ahead(batches: grain.MapDataset, *, num_workers: int, num_threads: int, ahead: int) -> grain.IterDataset:
    """Makes `batches` in order and ahead of their use, by workers or by threads of this process."""
    if num_workers:
        # Grain reads flags of its own when it starts workers. Outside of app.run (a notebook, a
        # test) nobody parses them, and absl would refuse to give their defaults.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Threads inside of workers would only wait for the same cores.
        ds = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(
            num_workers=num_workers, per_worker_buffer_size=max(1, math.ceil(ahead / num_workers))
        )
        return ds.mp_prefetch(options, worker_init_fn=_worker_init)
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(ahead, num_threads))
    )


def _default_threads() -> int:
    # A thread holds a whole batch in the making: a few are enough, more cost memory.
    return min(4, os.cpu_count() or 1)


def _clear_error(e: Exception) -> Exception:
    """`e` without the frames of threads and workers, which would bury its one sentence."""
    if isinstance(e, InputError):
        error = InputError(str(e))
        error.__cause__ = e.__cause__
        return error
    if "Worker process was terminated" in str(e):
        return InputError(
            f"an input worker process died: {str(e).split('. ')[0]}; it may have run out of memory "
            "or of /dev/shm (docker: --shm-size), or the main module doesn't guard its entry point "
            'with `if __name__ == "__main__":`; input.num_workers=0 uses threads instead'
        )
    return e


_KNOWN = {
    "anneal",
    "data",
    "pp",
    "batch_size",
    "num_workers",
    "num_threads",
    "prefetch",
    "allow_missing_eos",
    "on_error",
}
# big_vision's keys that say how tf.data should do what is done differently here.
_IGNORED = {"shuffle_buffer_size", "cache_raw", "num_parallel_calls", "tfdata"}


class TrainingInput:
    """An endless iterator of global batches; made by `training`.

    num_examples: in one epoch. steps_per_epoch: float. step: number of the next batch.
    stats: of the batches handed out so far, of the rows that this process loads: `examples`,
    `truncated` (rows that lost tokens), `tokens_cut`, `longest_cut`.
    num_skipped: records skipped (input.on_error="skip") since step 0, as `skipped` told of them.
    wait_seconds: time spent in `next` waiting for input.
    Close it when it's no longer needed (`close()`, or `with`): it owns threads and processes.
    """

    def __init__(
        self,
        batches: grain.IterDataset,
        *,
        sizes: Mapping[str, int],
        which: np.ndarray | None,
        batch_size: int,
        start_step: int,
        sharding: jax.sharding.Sharding,
        prefetch: int,
        name: str,
        rows: Mapping[str, grain.MapDataset],
        labels: grain.MapDataset,
        state: Mapping[str, Any],
        piece: int,
    ):
        self.num_examples = sum(sizes.values())
        self.batch_size = batch_size
        self.steps_per_epoch = self.num_examples / batch_size
        self._sizes, self._which = sizes, which
        self.step = start_step
        self.stats = {"examples": 0, "truncated": 0, "tokens_cut": 0, "longest_cut": 0}
        self.wait_seconds = 0.0
        self._name = name
        self._reported = 0
        self._rows = rows
        self._labels = labels
        self._state = state
        self._piece = piece
        self._skipped: list[dict[str, Any]] = []
        self.num_skipped = state["skipped"]

        def to_devices(
            made: tuple[dict[str, np.ndarray], np.ndarray, list[dict[str, Any]]],
        ) -> tuple[dict[str, jax.Array], np.ndarray, list[dict[str, Any]]]:
            host, cut, skipped = made
            return _put(host, sharding, batch_size), np.array(cut), skipped

        ahead = grain.experimental.ThreadPrefetchIterDataset(batches.map(to_devices), prefetch_buffer_size=prefetch)
        self._iterator = iter(ahead)

    def __iter__(self) -> "TrainingInput":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if self._iterator is None:
            raise StopIteration
        start = time.perf_counter()
        try:
            batch, cut, skipped = next(self._iterator)
        except Exception as e:
            error = _clear_error(e)
            self.close()
            raise error from error.__cause__
        finally:
            self.wait_seconds += time.perf_counter() - start
        self.stats["examples"] += len(cut)
        self.stats["truncated"] += int((cut > 0).sum())
        self.stats["tokens_cut"] += int(cut.sum())
        self.stats["longest_cut"] = max(self.stats["longest_cut"], int(cut.max()))
        for one in skipped:
            logging.log_first_n(
                logging.WARNING,
                "input, step %d: a record is skipped, another takes its place: %s",
                20,  # All are in the list that `skipped` gives.
                self.step,
                one["reason"],
            )
            # Workers hand dicts back with their keys in another order.
            keys = ("set", "record", "question_id", "reason")
            self._skipped.append({"step": self.step, **{k: one[k] for k in keys}})
        self.step += 1
        if int(self.step / self.steps_per_epoch) > int((self.step - 1) / self.steps_per_epoch):
            self._report()
        return batch

    def first_rows(self) -> dict[str, dict[str, np.ndarray]]:
        """{name: a row} of each data set, as pp makes it for training; loads no batch."""
        return {name: rows[0][0] for name, rows in self._rows.items()}

    def epochs(self) -> dict[str, float]:
        """How often each set was gone through in the batches so far, from step 0 on, in all
        processes together: {name: epochs}."""
        drawn = self.step * self.batch_size
        if self._which is None:
            counts = [drawn]
        else:
            counts = np.bincount(self._which[:drawn], minlength=len(self._sizes)).tolist()
        return {name: n / size for (name, size), n in zip(self._sizes.items(), counts)}

    def question_ids(self, step: int) -> list[str]:
        """The question ids of the global batch of any step, in order; found anew, without pp.

        A record without a question_id is called "train[17]"; in a mixture, the name of the set
        stands before each ("slake:q5").
        """
        first = int(step) * self.batch_size
        return [self._labels[first + i] for i in range(self.batch_size)]

    def state(self) -> dict[str, Any]:
        """What `training(state=...)` needs to go on here; JSON-able, the same in all processes.

        What was skipped counts as far as `skipped` has told of it: call that before.
        """
        return {**self._state, "next_step": self.step, "skipped": self.num_skipped}

    def skipped(self) -> list[dict[str, Any]]:
        """The records skipped since the last call, in all processes, by step. Collective.

        Each is a dict(step, set, record, question_id, reason): set is the name of the data set (in
        a mixture, its name there), record the index in its split, question_id None if it has none.
        Only batches that were handed out count, so the list is that of these steps in any run.
        """
        # Processes that differ along another axis than "data" hold the same piece.
        pieces = dict(distributed.gather([self._piece, self._skipped]))
        self._skipped = []
        new = [one for piece in sorted(pieces) for one in pieces[piece]]
        self.num_skipped += len(new)
        return sorted(new, key=lambda one: one["step"])

    def _report(self) -> None:
        new = self.stats["truncated"] - self._reported
        if new:
            logging.warning(
                "input %s: %d of %d examples so far lost tokens to tolen (%d of them since the "
                "last report, %d tokens at most); a larger text_len keeps them",
                self._name,
                self.stats["truncated"],
                self.stats["examples"],
                new,
                self.stats["longest_cut"],
            )
        self._reported = self.stats["truncated"]

    def close(self) -> None:
        """Ends threads and workers and reports what was truncated; no batches come after it."""
        if self._iterator is not None:
            iterator, self._iterator = self._iterator, None
            iterator.close()
            self._report()

    def __enter__(self) -> "TrainingInput":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


# Keeps the orders of two sets of a mixture apart; any odd number would do.
_APART = 0x9E3779B1


def _is_mixture(data: Any) -> bool:
    """Whether `input.data` is {name: weight} rather than one data set."""
    return isinstance(data, Mapping | ConfigDict) and not isinstance(data.get("name"), str)


def _phases(cfg: Mapping[str, Any]) -> list[tuple[float, dict[str, float]]]:
    """Shares of the sets of a mixture over training, as `mixture.check_phases` gives them."""
    try:
        return mixture.check_phases(dict(cfg["data"]), cfg.get("anneal"))
    except ValueError as e:
        raise InputError(str(e)) from None


def _parts(cfg: Mapping[str, Any]) -> dict[str, tuple[Source, str | PpFn]]:
    """{name: (source, pp)} of each set that `config.input` draws from."""
    if not _is_mixture(cfg["data"]):
        if "pp" not in cfg:
            raise InputError(f"input: 'pp' is missing, found {sorted(cfg)}")
        if cfg.get("anneal"):
            raise InputError("input.anneal is for mixtures, but input.data is one data set")
        return {cfg["data"]["name"]: (open_source(cfg["data"]), cfg["pp"])}
    phases, out = _phases(cfg), {}
    for name in phases[0][1]:
        section = dict(cfg.get(name) or {})
        if unknown := sorted(set(section) - {"data", "pp"}):
            raise InputError(f"input.{name}: unknown keys {unknown}, expected data and pp")
        pp = section.get("pp", cfg.get("pp"))
        if "data" not in section or pp is None:
            raise InputError(
                f"input.data has {name!r}, so input.{name}=dict(data=..., pp=...) is expected; found {sorted(section)}"
            )
        if any(shares[name] for _, shares in phases):
            out[name] = (open_source(section["data"]), pp)
    return out


def num_examples(input_cfg: Mapping[str, Any]) -> int:
    """Examples in an epoch of `config.input`: for a mixture, those of all its sets together,
    whatever their weights (as in big_vision)."""
    return sum(len(source) for source, _ in _parts(input_cfg).values())


class _Selection:
    """Place in a mixture → (number of the set, place in its endless stream), for Grain."""

    def __init__(self, which: np.ndarray, place: np.ndarray):
        self.which = which
        self._place = place

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(self.which[index]), int(self._place[index])


def _check_state(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError where a run was left in another `state` than that in which it would go on now."""
    for key in sorted((now.keys() | state.keys()) - {"skipped"}):
        if state.get(key) != now.get(key):
            raise InputError(
                f"the checkpoint was made with another input: {key} was {state.get(key)} and is "
                f"now {now.get(key)}; set it back, or start anew in another workdir"
            )


def training(
    input_cfg: Mapping[str, Any],
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
    eos_token: int = 1,
    start_step: int = 0,
    total_steps: int | None = None,
    state: Mapping[str, Any] | None = None,
) -> TrainingInput:
    """Shuffled batches for `config.input`, without end unless it is a mixture.

    input_cfg: data (see `open_source`), pp (a string, or a picklable `fn(data, rng) -> dict`),
    batch_size (global); for a mixture, data is {name: weight}, input.<name> has data and pp of each
    (input.pp where it has none), and anneal=[(fraction of training, {name: weight}), ...] changes
    the weights on the way (see `mixture`); num_workers=0 processes or else num_threads that run pp,
    prefetch=2 batches kept on the devices, allow_missing_eos=False, on_error="error" or "skip":
    what to do about a record that can't be read or preprocessed (see `_TrainRow`). Every epoch is
    shuffled whole, so shuffle_buffer_size is accepted and means nothing.
    seed: of order and pp, 0 <= seed < 2**32. start_step: the first batch is that of this step.
    total_steps: of the whole run; a mixture has to know it.
    state: of `TrainingInput.state` when the run was left; a config that would go on with other
    batches is refused.
    mesh: rows are cut along its axis "data"; without a mesh everything is on one device.
    Every process loads only its piece of a batch; the global batch is the same for any number.
    Each batch: key -> jax.Array[batch_size, ...], all that pp leaves except keys starting with "_".
    InputError, here: a config that can't work. InputError, from `next`: a record that can't be read
    or preprocessed (unless skipped), non-array keys left by pp, or (unless allowed) a row without a
    supervised EOS, i.e. no position with text == eos_token and mask_loss > 0.
    """
    cfg = dict(input_cfg)
    mixed = set(cfg["data"]) if _is_mixture(cfg.get("data")) else set()
    if unknown := sorted(set(cfg) - _KNOWN - _IGNORED - mixed):
        raise InputError(f"input: unknown keys {unknown}, expected some of {sorted(_KNOWN)}")
    if missing := [k for k in ("data", "batch_size") if k not in cfg]:
        raise InputError(f"input: {missing[0]!r} is missing, found {sorted(cfg)}")
    batch_size = _check_batch_size(cfg["batch_size"], mesh, "input.batch_size")
    numbers = {
        "num_workers": cfg.get("num_workers") or 0,
        "num_threads": cfg.get("num_threads") or _default_threads(),
        "prefetch": cfg.get("prefetch", 2),
        "start_step": start_step,
        "seed": seed,
    }
    for key, value in numbers.items():
        limit = 2**32 if key == "seed" else 2**31
        if not isinstance(value, int | np.integer) or not 0 <= value < limit:
            raise InputError(f"{key}={value!r}: expected a whole number from 0 up to {limit - 1}")

    on_error = cfg.get("on_error") or "error"
    if on_error not in ("error", "skip"):
        raise InputError(f"input.on_error={on_error!r}: expected 'error' or 'skip'")

    parts, rows, labels, selection = _parts(cfg), [], [], None
    is_mixture = _is_mixture(cfg["data"])
    for i, (name, (source, pp)) in enumerate(parts.items()):
        row = _TrainRow(
            source,
            pp,
            name=name,
            in_mixture=is_mixture,
            on_error=on_error,
            eos_token=eos_token,
            allow_missing_eos=bool(cfg.get("allow_missing_eos")),
        )
        order = grain.MapDataset.range(len(source)).seed((int(seed) + _APART * i) % 2**32)
        order = order.shuffle().repeat()
        # At the same depth of the pipeline, both are given the same random numbers.
        rows.append(order.random_map(row))
        labels.append(order.random_map(row.label))
    rows_of = dict(zip(parts, rows))
    now = {
        "next_step": int(start_step),
        "seed": int(seed),
        "batch_size": batch_size,
        "sets": {name: [source.split, len(source)] for name, (source, _) in parts.items()},
    }
    if is_mixture:
        if not total_steps:
            raise InputError("a mixture needs total_steps, which its shares refer to")
        phases = [(at, {n: shares[n] for n in parts}) for at, shares in _phases(cfg)]
        now["mixture"] = [[at, shares] for at, shares in phases]
        if len(phases) > 1:  # Without annealing, a longer run begins as a shorter one.
            now["total_steps"] = int(total_steps)
        selection = _Selection(*mixture.draw(phases, int(total_steps) * batch_size))
        rows = [grain.MapDataset.select_from_datasets(rows, selection)]
        labels = [grain.MapDataset.select_from_datasets(labels, selection)]
    if state is not None:
        _check_state(state, now)
    now["skipped"] = int((state or {}).get("skipped", 0))
    (rows,), (labels,) = rows, labels
    sharding = _sharding_of(mesh)
    piece, pieces = _process_share(sharding, batch_size)
    # The stream of rows is cut into pieces of batch_size / pieces; this process makes every
    # pieces-th one. Batches are an index into an endless sequence until here, so starting at a
    # later one costs nothing.
    batches = rows.batch(batch_size // pieces, drop_remainder=True, batch_fn=_train_batch)
    batches = batches[int(start_step) * pieces + piece :: pieces]
    batches = _run_ahead(
        batches,
        num_workers=int(numbers["num_workers"]),
        num_threads=int(numbers["num_threads"]),
        ahead=max(1, int(numbers["prefetch"])),
    )
    return TrainingInput(
        batches,
        sizes={name: len(source) for name, (source, _) in parts.items()},
        which=None if selection is None else selection.which,
        batch_size=batch_size,
        start_step=int(start_step),
        sharding=sharding,
        prefetch=int(numbers["prefetch"]),
        name=" + ".join(f"{source.name} {source.split}" for source, _ in parts.values()),
        rows=rows_of,
        labels=labels,
        state=now,
        piece=piece,
    )


# --- Evaluation ---


class EvalBatch:
    """Batch number -> (arrays, `_mask` among them; other keys of the valid rows; tokens cut)."""

    def __init__(self, source: Any, pp: Preprocess, batch_size: int, piece: int, pieces: int):
        self._source = _WithIndex(source)
        self._pp = pp
        self._batch_size = batch_size
        self._piece = piece
        self._rows = batch_size // pieces

    def __call__(self, batch: int) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], list[int]]:
        first = batch * self._batch_size + self._piece * self._rows
        valid = range(first, min(first + self._rows, len(self._source)))
        made = [self._pp(self._source[i]) for i in valid]
        arrays = [m[0] for m in made]
        # A process whose piece of the last batch is all padding needs a row to copy, too.
        filler = arrays[0] if arrays else self._pp(self._source[batch * self._batch_size])[0]
        stacked = _stack(arrays + [filler] * (self._rows - len(arrays)))
        if not stacked:
            raise InputError("the eval pp leaves no arrays; keep image, text, mask_ar, mask_input")
        stacked["_mask"] = np.arange(self._rows) < len(arrays)
        return stacked, [m[1] for m in made], [m[2] for m in made]


class EvalInput:
    """One split in order, in batches of equal size, as often as wanted; made by `evaluation`.

    len(): number of examples. num_batches: number of batches.
    stats: of the last (or running) pass, of the rows of all processes: `examples`, `truncated`.
    cut: tokens that each row of the latest batch lost to `tolen`.
    """

    def __init__(
        self,
        batches: grain.IterDataset,
        *,
        num_examples: int,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        piece: int,
        name: str,
    ):
        self.batch_size = batch_size
        self.num_batches = math.ceil(num_examples / batch_size)
        self.stats = {"examples": 0, "truncated": 0}
        self.cut: list[int] = []
        self._num_examples = num_examples
        self._batches = batches
        self._sharding = sharding
        self._piece = piece
        self._name = name

    def __len__(self) -> int:
        return self._num_examples

    def __iter__(self) -> Iterator[tuple[dict[str, jax.Array], list[dict[str, Any]]]]:
        stats = self.stats = {"examples": 0, "truncated": 0}
        iterator = iter(self._batches)
        try:
            for _ in range(self.num_batches):
                host, rows, cut = self._next(iterator)
                self.cut = cut
                stats["examples"] += len(cut)
                stats["truncated"] += sum(c > 0 for c in cut)
                yield _put(host, self._sharding, self.batch_size), rows
        finally:
            iterator.close()
        self._report(stats)

    def _next(self, iterator: Iterator[Any]) -> tuple[dict[str, np.ndarray], list, list[int]]:
        """(arrays of this process, other keys and tokens cut of the rows of all processes).

        An error of one process is told to all, which otherwise would wait for it in vain.
        """
        error, host, rows, cut = None, {}, [], []
        try:
            host, rows, cut = next(iterator)
        except Exception as e:
            error = _clear_error(e)
        if jax.process_count() > 1:
            try:
                text = json.dumps(rows, default=_to_list)
            except TypeError as e:
                error, text = InputError(f"the eval pp leaves what can't be sent: {e}"), ""
            everything = distributed.gather([self._piece, text, cut, error and str(error)])
            for process, (*_, message) in enumerate(everything):
                if message and not error:
                    error = InputError(f"in process {process}: {message}")
            if not error:
                # Processes that differ along another axis than "data" hold the same piece.
                pieces = {piece: (json.loads(text), cut) for piece, text, cut, _ in everything}
                rows = [row for p in sorted(pieces) for row in pieces[p][0]]
                cut = [n for p in sorted(pieces) for n in pieces[p][1]]
        if error:
            raise error from error.__cause__
        return host, rows, cut

    def _report(self, stats: Mapping[str, int]) -> None:
        if stats["truncated"]:
            logging.warning(
                "input %s: %d of %d prompts lost tokens to tolen; a larger text_len keeps them",
                self._name,
                stats["truncated"],
                stats["examples"],
            )


def _to_list(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}; leave its key out of keep(...)")


def evaluation(
    data: Mapping[str, Any],
    pp: str | PpFn,
    batch_size: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
    num_workers: int = 0,
    num_threads: int | None = None,
) -> EvalInput:
    """One pass over a split in order: yields (batch, rows).

    batch: key -> jax.Array[batch_size, ...], cut along the mesh axis "data", with `_mask`
    bool[batch_size]. The last batch is filled up with copies of its first row, `_mask` False.
    rows: for each valid row of the batch, in order, a dict of the keys that are no arrays, such as
    question_id and answer; the pp's keep() says which. With several processes, each loads its piece
    of a batch and is told the rows of the others: text and numbers, with lists for nested arrays.
    All must then go through the batches together.
    Arguments and errors as in `training`; pp gets no rng, so random ops are refused.
    """
    batch_size = _check_batch_size(batch_size, mesh, "batch_size")
    source = open_source(data)
    sharding = _sharding_of(mesh)
    piece, pieces = _process_share(sharding, batch_size)
    make = EvalBatch(source, Preprocess(pp, source), batch_size, piece, pieces)
    batches = grain.MapDataset.range(math.ceil(len(source) / batch_size)).map(make)
    return EvalInput(
        _run_ahead(
            batches,
            num_workers=int(num_workers or 0),
            num_threads=int(num_threads or _default_threads()),
            ahead=2,
        ),
        num_examples=len(source),
        batch_size=batch_size,
        sharding=sharding,
        piece=piece,
        name=f"{source.name} {source.split}",
    )
