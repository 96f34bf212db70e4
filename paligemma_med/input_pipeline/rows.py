"""One record through pp, and several rows to a batch: plain numpy, no devices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.input_pipeline.sources import Source
from paligemma_med.pp import get_preprocess_fn

PpFn = Callable[[dict[str, Any], np.random.Generator | None], dict[str, Any]]


def _is_array(value: Any) -> bool:
    if not isinstance(value, np.ndarray | np.generic | bool | int | float):
        return False
    return np.asarray(value).dtype.kind not in "OSUMm"  # objects, texts and dates


class Preprocess:
    """Applies pp to `(index, record)`, and sorts what comes out by whether a device can hold it.

    Returns (arrays, others, cut): key -> numpy, key -> anything else, tokens that `tolen` cut off.
    Keys that start with "_" are pp's bookkeeping and are dropped.
    """

    def __init__(self, pp: str | PpFn, source: Any):
        self._pp = get_preprocess_fn(pp) if isinstance(pp, str) else pp
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


# When this many records fail one after another, it is the config or the disk that is broken.
_TRIES = 10


class TrainRow:
    """Index in a set -> (arrays, tokens cut off, records skipped on the way), for training.

    With on_error="skip", a record that can't be read or preprocessed is replaced by another one of the set,
    drawn by the row's own random numbers, so that batches still only depend on the seed and the step.
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
            wanted = ", ".join(f'"{k}"' for k in arrays)
            unwanted = ", ".join(f"{k} ({type(v).__name__})" for k, v in others.items())
            raise InputError(
                f"input.pp leaves keys that are no arrays: {unwanted}; add keep({wanted}) at its end, or fewer of these"
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
                # Running out of memory isn't the record's fault; skipping it would change the run.
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
        """The question_id of the row that the same arguments give, or "train[17]" if it has none.

        In a mixture, the name of the set comes before it.
        """
        index = int(index)
        if self._skips:  # Only pp can tell whether another record took this one's place.
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


def train_batch(
    rows: Sequence[tuple[dict[str, np.ndarray], int, list[dict[str, Any]]]],
) -> tuple[dict[str, np.ndarray], np.ndarray, list[dict[str, Any]]]:
    """What `TrainRow` gives for several rows -> (batch, int32[rows] tokens cut off, skipped records)."""
    arrays, cut, skipped = zip(*rows)
    return stack(arrays), np.array(cut, np.int32), [one for row in skipped for one in row]


def stack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
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


class WithIndex:
    """A source whose items know their index, for error messages: `[i]` -> (i, record)."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return int(index), self._source[index]
