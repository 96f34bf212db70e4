"""Evaluation loss: how probable the model finds the true answers of a split. big_vision's `proj.paligemma.perplexity`.

One pass, nothing is generated. The pp is that of training, so that loss and training loss are of the same tokens; its
figures `avg` and `sum` are big_vision's, and `metrics.losses` says what else there is. Written are metrics.json and
losses.jsonl, a line a row, from which all figures follow.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_med import decode
from paligemma_med.evaluation import progress, questions, results
from paligemma_med.metrics import losses
from paligemma_med.parallel import distributed

# What a row must have, and the arrays of the model.
NEEDED = ("question_id",)
ARRAYS = ("image", "text", "mask_ar", "mask_loss")
PROGRAM = "losses"  # what it has a model compute: one of `forecast.PROGRAMS`
LOSSES = "losses.jsonl"
_NOT_OF_THE_ROW = (*ARRAYS, "image_at", "_mask")


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Evaluator:
    """The loss on each row of a split.

    Arguments as of `evaluation.evaluator.Evaluator`, as far as they are here, and
      loss_chunk: positions of a row whose logits exist at a time.
    """

    model: Any = dataclasses.field(kw_only=False)
    tokenizer: Any = dataclasses.field(kw_only=False)
    inputs: Iterable[tuple[Mapping, Sequence[Mapping]]]
    total: int | None = None
    groups: Sequence[str] = losses.GROUPS
    loss_chunk: int = 16
    outdir: str | pathlib.Path | None = None
    about: Callable[[Any], dict] | None = None
    resume: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self):
        self.groups = tuple(self.groups)
        self.outdir = pathlib.Path(self.outdir) if self.outdir else None

    def run(self, params) -> dict[str, float]:
        """Evaluates these parameters: {name: number}, as `metrics.losses` describes them.

        Writes, if there is an outdir, metrics.json (the same, and "about") and losses.jsonl: whatever text and numbers
        the pp keeps of a row, its `loss` and `tokens`, and `tokens_cut`, how many it lost to tolen.

        Raises:
          ValueError: a row without question_id, no rows, or none with a supervised token.
        """
        about = self.about(params) if self.about else {}
        identity = results.identity(about)
        resume = bool(identity) and self.resume
        rows = results.finished(self.outdir, identity, LOSSES) if resume and self.outdir else None
        if rows is None:
            with contextlib.closing(results.Part(self.outdir, identity, resume)) as part:
                rows = self._rows(params, part)
        elif distributed.is_main():
            print(f"{self.outdir} is there for these weights.", file=sys.stderr, flush=True)
        metrics = losses.summarise(rows, self.groups)
        if cut := sum(row.get("tokens_cut", 0) > 0 for row in rows):
            metrics["truncated"] = cut
        if self.outdir:
            about = {"groups": self.groups, "split_hash": results.split_hash(rows), **about}
            results.write(self.outdir, rows, metrics, about, LOSSES)
        return metrics

    def _rows(self, params, part):
        rows, waiting = [], None
        with progress.bar("loss", self.total) as bar:
            for i, (batch, source) in enumerate(self.inputs):
                asked = self._lines(batch, source)
                done = questions.checked(part.saved.get(("model", i)), asked)
                if done is None:
                    found = decode.answer_losses(self.model, params, _arrays(batch), chunk=self.loss_chunk)
                    new = (i, asked, found)
                else:
                    new = (i, done, None)
                # One batch late, so that the devices have the next one while this one is written.
                rows += self._take(waiting, part)
                waiting = new
                bar.update(len(source))
            rows += self._take(waiting, part)
        if not rows:
            raise ValueError("there are no rows to evaluate on.")
        return rows

    def _take(self, waiting, part):
        if waiting is None:
            return []
        i, rows, found = waiting
        if found is None:
            return rows
        sums, tokens = (x[: len(rows)].tolist() for x in distributed.to_host(found))
        rows = [row | dict(loss=loss, tokens=count) for row, loss, count in zip(rows, sums, tokens, strict=True)]
        part.add("model", i, rows)
        return rows

    def _lines(self, batch, source):
        """What is known of each row of the batch before it is evaluated."""
        valid = distributed.to_host(batch["_mask"]) if "_mask" in batch else np.ones(len(source))
        if not np.array_equal(np.flatnonzero(valid), np.arange(len(source))):
            raise ValueError(f"_mask is {valid} for {len(source)} rows; expected the valid ones first.")
        numbers = {k: v for k, v in batch.items() if k not in _NOT_OF_THE_ROW and v.ndim == 1}
        numbers = {k: v.tolist() for k, v in distributed.to_host(numbers).items()}
        cut = getattr(self.inputs, "cut", None)
        out = []
        for i, row in enumerate(source):
            if "question_id" not in row:
                raise ValueError(f"a row has no 'question_id', found {sorted(row)}; add it to the keep(...) of pp_fn.")
            line = results.plain(row | {k: v[i] for k, v in numbers.items()}, f"question {row['question_id']!r}")
            out.append(line | (dict(tokens_cut=int(cut[i])) if cut is not None else {}))
        return out


def _arrays(batch):
    return {k: batch[k] for k in _NOT_OF_THE_ROW if k in batch}
