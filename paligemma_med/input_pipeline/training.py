"""Endless shuffled batches for training, of one data set or of a mixture, that resume exactly.

A stream is an index into an endless sequence of rows until pp is applied, so that starting at a
later step costs nothing.
"""

import functools
import time
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np
from absl import logging

from paligemma_med.input_pipeline import devices, workers
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.input_pipeline.rows import TrainRow, train_batch
from paligemma_med.input_pipeline.sets import Selection, TrainingSets, is_mixture
from paligemma_med.parallel import distributed

# Keys of config.input. In a mixture, the name of each set is also a key.
KEYS = {
    "anneal",
    "data",
    "pp",
    "batch_size",
    "num_workers",
    "num_threads",
    "prefetch",
    "allow_missing_eos",
    "on_error",
    "held_out",
}
# big_vision's settings of tf.data, which isn't used here.
IGNORED_KEYS = {"shuffle_buffer_size", "cache_raw", "num_parallel_calls", "tfdata"}
# Keeps the orders of two sets of a mixture apart; any odd number would do.
_APART = 0x9E3779B1


class TrainingInput:
    """An endless iterator of global batches; made by `training`.

    num_examples: in one epoch. steps_per_epoch: float. step: number of the next batch.
    stats: of the batches handed out so far, counting the rows that this process loads: `examples`,
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

        on_devices = batches.map(functools.partial(_put, sharding=sharding, batch_size=batch_size))
        ahead = grain.experimental.ThreadPrefetchIterDataset(on_devices, prefetch_buffer_size=prefetch)
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
            error = workers.clear_error(e)
            self.close()
            raise error from error.__cause__
        finally:
            self.wait_seconds += time.perf_counter() - start
        self.stats["examples"] += len(cut)
        self.stats["truncated"] += int((cut > 0).sum())
        self.stats["tokens_cut"] += int(cut.sum())
        self.stats["longest_cut"] = max(self.stats["longest_cut"], int(cut.max()))
        for record in skipped:
            logging.log_first_n(
                logging.WARNING,
                "input, step %d: a record is skipped, another takes its place: %s",
                20,  # All are in the list that `skipped` gives.
                self.step,
                record["reason"],
            )
            # Workers hand dicts back with their keys in another order.
            keys = ("set", "record", "question_id", "reason")
            self._skipped.append({"step": self.step, **{k: record[k] for k in keys}})
        self.step += 1
        if int(self.step / self.steps_per_epoch) > int((self.step - 1) / self.steps_per_epoch):
            self._report()
        return batch

    def first_rows(self) -> dict[str, dict[str, np.ndarray]]:
        """{name: a row} of each data set, as pp makes it for training; loads no batch."""
        return {name: rows[0][0] for name, rows in self._rows.items()}

    def epochs(self) -> dict[str, float]:
        """{name: epochs of this set} in the batches since step 0, over all processes."""
        drawn = self.step * self.batch_size
        if self._which is None:
            counts = [drawn]
        else:
            counts = np.bincount(self._which[:drawn], minlength=len(self._sizes)).tolist()
        return {name: n / size for (name, size), n in zip(self._sizes.items(), counts)}

    def question_ids(self, step: int) -> list[str]:
        """The question ids of the global batch of any step, in order; recomputed, without pp.

        A record without a question_id is called "train[17]"; in a mixture, the name of the set
        stands before each ("slake:q5").
        """
        first = int(step) * self.batch_size
        return [self._labels[first + i] for i in range(self.batch_size)]

    def state(self) -> dict[str, Any]:
        """What `training(state=...)` needs to continue here; JSON-able, the same in all processes.

        Skipped records are counted as far as `skipped` has told of them: call that before.
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
        new = [record for piece in sorted(pieces) for record in pieces[piece]]
        self.num_skipped += len(new)
        return sorted(new, key=lambda record: record["step"])

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


def _put(
    batch: tuple[dict[str, np.ndarray], np.ndarray, list[dict[str, Any]]],
    sharding: jax.sharding.Sharding,
    batch_size: int,
) -> tuple[dict[str, jax.Array], np.ndarray, list[dict[str, Any]]]:
    arrays, cut, skipped = batch
    # A worker hands arrays over in shared memory, which it uses again.
    return devices.put(arrays, sharding, batch_size), np.array(cut), skipped


def training(
    input_cfg: Mapping[str, Any],
    *,
    seed: int,
    mesh: jax.sharding.Mesh | None = None,
    eos_token: int = 1,
    start_step: int = 0,
    total_steps: int | None = None,
    state: Mapping[str, Any] | None = None,
    sets: TrainingSets | None = None,
) -> TrainingInput:
    """Shuffled batches for `config.input`, without end unless it is a mixture.

    input_cfg: data (see `open_source`), pp (a string, or a picklable `fn(data, rng) -> dict`),
    batch_size (global); for a mixture, data is {name: weight}, input.<name> has data and pp of each
    (input.pp where it has none), and anneal=[(fraction of training, {name: weight}), ...] changes
    the weights on the way (see `mixture`); num_workers=0 processes or else num_threads that run pp,
    prefetch=2 batches kept on the devices, allow_missing_eos=False, on_error="error" or "skip":
    what to do about a record that can't be read or preprocessed (see `TrainRow`); held_out: see
    `overlap.check_held_out`, which a run's checks call. Every epoch is
    shuffled whole, so shuffle_buffer_size is accepted and means nothing.
    seed: of order and pp, 0 <= seed < 2**32. start_step: the first batch is that of this step.
    total_steps: of the whole run; a mixture has to know it.
    state: of `TrainingInput.state` when the run was left; a config that would continue with other
    batches is refused.
    mesh: rows are cut along its axis "data"; without a mesh everything is on one device.
    sets: what input_cfg names, if it is open already.
    Every process loads only its piece of a batch; the global batch is the same for any number.
    Each batch: key -> jax.Array[batch_size, ...], all that pp leaves except keys starting with "_".
    InputError, here: a config that can't work. InputError, from `next`: a record that can't be read
    or preprocessed (unless skipped), non-array keys left by pp, or (unless allowed) a row without a
    supervised EOS, i.e. no position with text == eos_token and mask_loss > 0.
    """
    cfg = dict(input_cfg)
    _check_keys(cfg)
    batch_size = devices.check_batch_size(cfg["batch_size"], mesh, "input.batch_size")
    numbers = _check_numbers(cfg, start_step, seed)
    sets = TrainingSets(cfg) if sets is None else sets
    if sets.phases and not total_steps:
        raise InputError("a mixture needs total_steps, which its shares refer to")
    now = _state(sets, seed=seed, start_step=start_step, batch_size=batch_size, total_steps=total_steps)
    if state is not None:
        _check_state(state, now)
    now["skipped"] = int((state or {}).get("skipped", 0))

    rows, labels = _streams(sets, cfg, seed, eos_token)
    selection = sets.selection(int(total_steps) * batch_size) if sets.phases else None
    sharding = devices.batch_sharding(mesh)
    piece, pieces = devices.process_share(sharding, batch_size)
    # The stream of rows is cut into pieces of batch_size / pieces; this process makes every
    # pieces-th one.
    batches = _joined(rows, selection).batch(batch_size // pieces, drop_remainder=True, batch_fn=train_batch)
    batches = batches[int(start_step) * pieces + piece :: pieces]
    batches = workers.run_ahead(
        batches,
        num_workers=int(numbers["num_workers"]),
        num_threads=int(numbers["num_threads"]),
        ahead=max(1, int(numbers["prefetch"])),
    )
    return TrainingInput(
        batches,
        sizes={name: len(source) for name, source in sets.sources.items()},
        which=None if selection is None else selection.which,
        batch_size=batch_size,
        start_step=int(start_step),
        sharding=sharding,
        prefetch=int(numbers["prefetch"]),
        name=" + ".join(f"{source.name} {source.split}" for source in sets.sources.values()),
        rows=rows,
        labels=_joined(labels, selection),
        state=now,
        piece=piece,
    )


def _check_keys(cfg: Mapping[str, Any]) -> None:
    names = set(cfg["data"]) if is_mixture(cfg.get("data")) else set()
    if unknown := sorted(set(cfg) - KEYS - IGNORED_KEYS - names):
        raise InputError(f"input: unknown keys {unknown}, expected some of {sorted(KEYS)}")
    if missing := [k for k in ("data", "batch_size") if k not in cfg]:
        raise InputError(f"input: {missing[0]!r} is missing, found {sorted(cfg)}")
    on_error = cfg.get("on_error") or "error"
    if on_error not in ("error", "skip"):
        raise InputError(f"input.on_error={on_error!r}: expected 'error' or 'skip'")


def _check_numbers(cfg: Mapping[str, Any], start_step: Any, seed: Any) -> dict[str, Any]:
    numbers = {
        "num_workers": cfg.get("num_workers") or 0,
        "num_threads": cfg.get("num_threads") or workers.default_threads(),
        "prefetch": cfg.get("prefetch", 2),
        "start_step": start_step,
        "seed": seed,
    }
    for key, value in numbers.items():
        limit = 2**32 if key == "seed" else 2**31
        if not isinstance(value, int | np.integer) or not 0 <= value < limit:
            raise InputError(f"{key}={value!r}: expected a whole number from 0 up to {limit - 1}")
    return numbers


def _state(
    sets: TrainingSets, *, seed: int, start_step: int, batch_size: int, total_steps: int | None
) -> dict[str, Any]:
    """Everything that batches from `start_step` on depend on, except pp."""
    state = {
        "next_step": int(start_step),
        "seed": int(seed),
        "batch_size": batch_size,
        "sets": {name: _what(source) for name, source in sets.sources.items()},
    }
    if sets.phases:
        state["mixture"] = [[start, shares] for start, shares in sets.phases]
        if len(sets.phases) > 1:  # Without annealing, a longer run begins as a shorter one does.
            state["total_steps"] = int(total_steps)
    return state


def _what(source: Any) -> list[Any]:
    """What batches depend on in a data set: of an own table, which anyone may edit, its digest, too."""
    return [source.split, len(source), *([source.digest()] if hasattr(source, "digest") else [])]


def _check_state(state: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises InputError if a run was saved in another `state` than the one it would resume in now."""
    for key in sorted((now.keys() | state.keys()) - {"skipped"}):
        if state.get(key) != now.get(key):
            raise InputError(
                f"the checkpoint was made with another input: {key} was {state.get(key)} and is "
                f"now {now.get(key)}; set it back, or start anew in another workdir"
            )


def _streams(
    sets: TrainingSets, cfg: Mapping[str, Any], seed: int, eos_token: int
) -> tuple[dict[str, grain.MapDataset], dict[str, grain.MapDataset]]:
    """({name: endless stream of rows}, {name: the same of their labels}), each set in its own order."""
    rows, labels = {}, {}
    for i, (name, source) in enumerate(sets.sources.items()):
        row = TrainRow(
            source,
            sets.pps[name],
            name=name,
            in_mixture=bool(sets.phases),
            on_error=cfg.get("on_error") or "error",
            eos_token=eos_token,
            allow_missing_eos=bool(cfg.get("allow_missing_eos")),
        )
        order = grain.MapDataset.range(len(source)).seed((int(seed) + _APART * i) % 2**32)
        order = order.shuffle().repeat()
        # Both are at the same depth of the pipeline, so Grain gives them the same random numbers.
        rows[name], labels[name] = order.random_map(row), order.random_map(row.label)
    return rows, labels


def _joined(streams: Mapping[str, grain.MapDataset], selection: Selection | None) -> grain.MapDataset:
    if selection is None:
        (stream,) = streams.values()
        return stream
    return grain.MapDataset.select_from_datasets(list(streams.values()), selection)
