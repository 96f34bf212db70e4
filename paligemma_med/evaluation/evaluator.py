"""What evaluators of questions share: asking a batch, the text controls, and the files.

`evaluators/` says in which passes, and with which images and prompts, the questions are asked.

In a run of several processes each gets all rows and answers, and comes to the same figures; the
first one writes them.
"""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from paligemma_med import decode
from paligemma_med.evaluation import controls as controls_lib
from paligemma_med.evaluation import progress, questions, results
from paligemma_med.metrics import scoring
from paligemma_med.parallel import distributed, notes
from paligemma_med.pp.tokenizer import get_tokenizer


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Evaluator:
    """Asks a model every question of a split and writes its answers; a base class.

    Its fields are its arguments. Those that a section of config.evals doesn't give,
    `experiment.make_evaluators` does.

    Who is asked, and how:
      model: `vlm.Model`.
      tokenizer: a spec as for `pp.tokenizer.get_tokenizer`, or a tokenizer.
      pred_kw: arguments of `decode.generate`; max_new_tokens is 32 if not given.
    What is asked:
      inputs: an iterable of (batch, rows) like `input_pipeline.evaluation`, gone through once in a
        run. The pp must keep image, text, mask_ar, mask_input, question_id, question, answer,
        answer_type, and image_id where there is one; whatever else it keeps is written.
      total: number of questions, for the progress bar.
    What its figures are:
      controls: some of scoring.CONTROLS.
      train_data: training rows for the majority controls: an iterable of dicts, read when they are
        first needed.
      protocol: one of scoring.PROTOCOLS.
      groups: keys of a row by whose values the figures are broken down.
    What is written:
      outdir: folder of metrics.json and predictions.jsonl; None writes nothing.
      about: a function of the parameters that gives the dict about what is evaluated, for
        metrics.json. All of it but `checkpoint` and `command` decides whether an evaluation is the
        same as an interrupted one; without it no evaluation is ever resumed.
      resume: whether `run` resumes an interrupted evaluation. Not an argument: set it afterwards.

    Raises:
      ValueError: an unknown control or protocol, or a control without what it needs; several
        samples at temperature 0.
    """

    model: Any = dataclasses.field(kw_only=False)
    tokenizer: Any = dataclasses.field(kw_only=False)
    inputs: Iterable[tuple[Mapping, Sequence[Mapping]]]
    total: int | None = None
    pred_kw: Mapping[str, Any] | None = None
    train_data: Iterable[Mapping] | None = None
    controls: Sequence[str] = scoring.TEXT_CONTROLS
    protocol: str = "vqa"
    groups: Sequence[str] = scoring.GROUPS
    outdir: str | pathlib.Path | None = None
    about: Callable[[Any], dict] | None = None
    resume: bool = dataclasses.field(default=True, init=False)

    known_controls = scoring.CONTROLS  # of the class, in the order of the tables

    def __post_init__(self):
        check_names("controls", self.controls, self.known_controls)
        check_names("protocol", [self.protocol], scoring.PROTOCOLS)
        if isinstance(self.tokenizer, str):
            self.tokenizer = get_tokenizer(self.tokenizer)
        self.pred_kw = {"max_new_tokens": 32, **(self.pred_kw or {})}
        samples = self.pred_kw.get("num_samples", 1)
        if samples > 1 and not self.pred_kw.get("temperature"):
            raise ValueError(
                f"pred_kw has num_samples={samples} at temperature 0, which are all the "
                "same answer and would pass for robust; set pred_kw.temperature."
            )
        self.controls = tuple(c for c in self.known_controls if c in self.controls)
        lost = [c for c in self.controls if c.startswith("majority") or c == scoring.MEAN_BOX]
        if self.train_data is None and lost:
            raise ValueError(f"the {lost[0]} control needs train_data, found None.")
        self.groups = tuple(self.groups)
        self.outdir = pathlib.Path(self.outdir) if self.outdir else None
        self._majority, self._means, self._has_asked = None, None, False

    def run(self, params) -> dict[str, float]:
        """Evaluates these parameters.

        Returns:
          {name: number}, as `scoring` describes them.

        Writes, if there is an outdir (see `results`):
          metrics.json: the same, and "about": split, split_hash, prompt_hash, protocol, and what
            the caller said.
          predictions.jsonl: a line a question, in the order of the split: question_id, image_id,
            image_key (a digest of the image as the model sees it), question, prompt (as the model
            read it), answer, answer_type, whatever else the pp keeps (content_type, …), choices
            where there are any, predictions (one a sample), logprobs (the log-probability of each,
            EOS included), unfinished (samples without EOS), tokens_cut (tokens that the prompt
            lost; where the input counts them), correct, correct_strict, correct_set (of the first
            sample); where choices are scored, option_logprobs and option_tokens (log-probability
            and number of tokens of each, EOS included). Then for each control {control}_prediction
            (majority, majority_type, echo) or {control}_predictions, {control}_logprobs and
            {control}_option_logprobs, and {control}_correct, …_strict, …_set;
            shuffled_images_image_id.

        Raises:
          ValueError: a row without a key it needs or with a key that leaks the answer, an empty
            answer, no questions.
        """
        self._check_vocabulary()
        with notes.stage("taking the weights' fingerprint"):
            about = self.about(params) if self.about else {}
        about = about and {**about, "controls": self.columns}
        identity = results.identity(about)
        resume = bool(identity) and self.resume
        rows = results.finished(self.outdir, identity) if resume and self.outdir else None
        if rows is None:
            part = results.Part(self.outdir, identity, resume)
            with contextlib.closing(part), tempfile.TemporaryDirectory(prefix="vqa-") as folder:
                rows = self.answered(params, part, folder)
        elif distributed.is_main():
            print(f"{self.outdir} is there for these weights.", file=sys.stderr, flush=True)
        columns = [c for c in self.columns if c in scoring.controls_of(rows)]  # one image can't be shuffled
        metrics = scoring.summarise(rows, self.protocol, columns, self.groups)
        if self.outdir:
            about = {
                "protocol": self.protocol,
                "groups": self.groups,
                "split_hash": results.split_hash(rows),
                "prompt_hash": results.prompt_hash(rows),
                **about,
            }
            results.write(self.outdir, rows, metrics, about)
        return metrics

    @property
    def columns(self) -> tuple[str, ...]:
        """The other columns of the tables: by default, the controls."""
        return self.controls

    def answered(self, params, part: results.Part, folder: str) -> list[dict]:
        """The rows of predictions.jsonl; those that `part` already has aren't asked again.

        Args:
          params: the model's.
          part: takes the rows of each batch as soon as there are any.
          folder: a temporary one, for this process alone.
        """
        raise NotImplementedError

    # --- What subclasses use ---

    def ask(self, params, batch, rows) -> list[dict]:
        """A dict of predictions, logprobs and unfinished for each valid row of a batch."""
        # A question's own number, so that its samples are the same in any split, slice and batch.
        ids = np.zeros(batch["text"].shape[0], np.uint32)
        ids[: len(rows)] = [zlib.crc32(str(row["question_id"]).encode()) for row in rows]
        kw = {"eos_token": self.tokenizer.stop_tokens, **self.pred_kw}
        with self._first_batch(len(rows)):
            tokens, logprobs = decode.generate(self.model, params, {**batch, "row_id": ids}, **kw)
            tokens, logprobs = (x[: len(rows)] for x in distributed.to_host((tokens, logprobs)))
        # Only new tokens are scored; `generate` never gives the prompt's back.
        assert tokens.shape[1:] == (kw.get("num_samples", 1), kw["max_new_tokens"])
        return [
            dict(
                predictions=[self.tokenizer.to_str(sample) for sample in samples],
                logprobs=[round(float(x), 6) for x in totals],
                unfinished=int(np.sum(~np.isin(samples, kw["eos_token"]).any(axis=-1))),
            )
            for samples, totals in zip(tokens, logprobs.sum(axis=-1))
        ]

    def _first_batch(self, count):
        """The first batch compiles the program, and the bar doesn't move until it is answered."""
        if self._has_asked:
            return contextlib.nullcontext()
        self._has_asked = True
        what = "question" if count == 1 else f"{count} questions"
        doing = f"compiling the program, and answering the first {what}"
        return notes.stage(doing, lambda text: distributed.is_main() and tqdm.tqdm.write(text, file=sys.stderr))

    def lines(self, batch, rows, pixels, choices=()) -> list[dict]:
        """`questions.lines` of this batch of the input."""
        cut = getattr(self.inputs, "cut", None)
        return questions.lines(batch, rows, pixels, self.tokenizer, choices=choices, cut=cut)

    def add_text_control(self, who, rows) -> None:
        """Adds to each row the answer of a control that needs no model."""
        if who.startswith("majority") and self._majority is None:
            self._majority = controls_lib.majority_answers(self.train_data)
        if who == scoring.MEAN_BOX and self._means is None:
            self._means = controls_lib.mean_boxes(self.train_data)
        for row in rows:
            if who == "echo":
                text = row["question"]
            elif who == scoring.MEAN_BOX:
                text = controls_lib.mean_box(self._means, row)
            elif who == "majority":
                text = controls_lib.majority_answer(self._majority, row)
            else:
                text = controls_lib.majority_of_type(self._majority, row)
            row[f"{who}_prediction"] = text
            row |= scoring.correct(text, scoring.truths(row), f"{who}_")

    def progress(self, what, total) -> tqdm.tqdm:
        """`progress.bar`."""
        return progress.bar(what, total)

    def _check_vocabulary(self):
        known, size = self.tokenizer.vocab_size, getattr(self.model, "vocab_size", None)
        if size and size > known:
            raise ValueError(
                f"the model can say {size} tokens, but the tokenizer knows {known}: "
                "it is not the model's, or lacks tokensets=('loc', 'seg')."
            )


def check_names(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError if one of `names` isn't among `known`."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{what} has {unknown[0]!r}; expected some of {list(known)}.")


class Placement:
    """The sharding of a batch's array, without the array, to place others in the same way."""

    def __init__(self, array):
        self._sharding = getattr(array, "sharding", None)

    def put(self, array) -> Any:
        return array if self._sharding is None else distributed.place(array, self._sharding)
