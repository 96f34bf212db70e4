"""One split in order, in batches of equal size, for evaluation."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from absl import logging

from paligemma_med.input_pipeline import devices, workers
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.input_pipeline.rows import PpFn, Preprocess, WithIndex, stack
from paligemma_med.input_pipeline.sources import open_source
from paligemma_med.parallel import distributed


class EvalBatch:
    """Batch number -> (arrays, `_mask` among them; other keys of the valid rows; tokens cut)."""

    def __init__(self, source: Any, pp: Preprocess, batch_size: int, piece: int, pieces: int):
        self._source = WithIndex(source)
        self._pp = pp
        self._batch_size = batch_size
        self._piece = piece
        self._rows = batch_size // pieces

    def __call__(self, batch: int) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], list[int]]:
        first = batch * self._batch_size + self._piece * self._rows
        valid = range(first, min(first + self._rows, len(self._source)))
        rows = [self._pp(self._source[i]) for i in valid]
        arrays = [row[0] for row in rows]
        # A process whose piece of the last batch is all padding needs a row to copy, too.
        filler = arrays[0] if arrays else self._pp(self._source[batch * self._batch_size])[0]
        stacked = stack(arrays + [filler] * (self._rows - len(arrays)))
        if not stacked:
            raise InputError("the eval pp leaves no arrays; keep image, text, mask_ar, mask_input")
        stacked["_mask"] = np.arange(self._rows) < len(arrays)
        return stacked, [row[1] for row in rows], [row[2] for row in rows]


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
                yield devices.put(host, self._sharding, self.batch_size), rows
        finally:
            iterator.close()
        self._report(stats)

    def _next(self, iterator: Iterator[Any]) -> tuple[dict[str, np.ndarray], list, list[int]]:
        """(arrays of this process, other keys and tokens cut of the rows of all processes).

        An error of one process is sent to all, which would otherwise wait for it forever.
        """
        error, host, rows, cut = None, {}, [], []
        try:
            host, rows, cut = next(iterator)
        except Exception as e:
            error = workers.clear_error(e)
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
    bool[batch_size]. The last batch is filled up with copies of its first row, `_mask` False. A split with
    fewer rows than batch_size makes one batch that is no longer than it has to be.
    rows: for each valid row of the batch, in order, a dict of the keys that are no arrays, such as
    question_id and answer; the pp's keep() says which. With several processes, each loads its piece
    of a batch and is told the rows of the others: text and numbers, with lists for nested arrays.
    All must then go through the batches together.
    Arguments and errors as in `training`; pp gets no rng, so random ops are refused.
    """
    batch_size = devices.check_batch_size(batch_size, mesh, "batch_size")
    source = open_source(data)
    shards = devices.shards(mesh)
    batch_size = min(batch_size, math.ceil(len(source) / shards) * shards)
    sharding = devices.batch_sharding(mesh)
    piece, pieces = devices.process_share(sharding, batch_size)
    make = EvalBatch(source, Preprocess(pp, source), batch_size, piece, pieces)
    batches = grain.MapDataset.range(math.ceil(len(source) / batch_size)).map(make)
    return EvalInput(
        workers.run_ahead(
            batches,
            num_workers=int(num_workers or 0),
            num_threads=int(num_threads or workers.default_threads()),
            ahead=2,
        ),
        num_examples=len(source),
        batch_size=batch_size,
        sharding=sharding,
        piece=piece,
        name=f"{source.name} {source.split}",
    )
