"""Visual question answering by exact match, with the controls that say what it means.

An accuracy alone says little: many questions can be answered without the image, so a model may
ignore it and score well. Two controls stand in the same table, made in the same run:

  majority          the most frequent answer to the same question in the training split: what can
                    be known from the question alone.
  shuffled_images   the same model and prompts, each question with another question's image. A
                    model that scores the same here doesn't look. Costs a second decoding pass.

Three figures are reported for each, from strict to lenient:

  acc_strict   equal but for case and blanks around: the usual "exact match" of the literature.
  acc          equal after `normalise`; the figure of the tables.
  acc_set      as acc, but the parts of a comma-separated answer may come in any order.

Of several samples of a question the first is scored.

In a run of several processes each gets all rows and answers, and comes to the same figures; the
first one writes them. Each keeps the images of its own shuffled control, in its own temporary
folder (2.4 MB an image of 448 px), since any image may be asked for next.
"""

import collections
import hashlib
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import zlib

import numpy as np
import tqdm

from paligemma_med import decode, distributed
from paligemma_med.evaluators import stats

CONTROLS = ("majority", "shuffled_images")
FIGURES = ("acc", "acc_strict", "acc_set")
NEEDED = ("question_id", "question", "answer", "answer_type")


# --- When two answers are equal ---


def strict(text):
    """Lower case, no blanks around."""
    return text.strip().lower()


def normalise(text):
    """The form in which answers are compared.

    Lower case; every comma (also the full-width `，` and the enumerating `、`) followed by one
    space and preceded by none; runs of white space become one space; white space around and
    `. , ; : ! ?` (also full-width) at the end are dropped. Nothing else: articles, plurals and
    number words count, and so does the order of a list.
    """
    text = re.sub(r"\s*[,，、]\s*", ", ", text.lower())
    return re.sub(r"\s+", " ", text).strip().rstrip(" .,;:!?。；：！？")


def as_set(text):
    """The set of an answer's comma-separated parts, normalised."""
    return frozenset(normalise(part) for part in normalise(text).split(", "))


def score(prediction, answer):
    """{figure: bool} for the three figures."""
    forms = dict(acc=normalise, acc_strict=strict, acc_set=as_set)
    return {k: form(prediction) == form(answer) for k, form in forms.items()}


# --- Majority answer ---


def majority_answers(rows):
    """The most frequent answers in training rows, for `majority_answer`.

    Args:
      rows: dicts with question, answer, answer_type and question_id.

    Returns:
      {("question", question): answer, ("answer_type", type): answer}. Questions are the same if
      their strings are, blanks around apart. Answers are counted as they are written, blanks around
      apart. Of equally frequent ones that wins which occurs first by question_id (numbers in it
      compared as numbers), so that the result doesn't depend on the order of rows on disk.
    """
    counts = collections.defaultdict(collections.Counter)
    for row in sorted(rows, key=lambda row: _natural(str(row["question_id"]))):
        for key in ("question", "answer_type"):
            counts[key, row[key].strip()][row["answer"].strip()] += 1
    # most_common keeps the order of insertion among equals.
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}


def majority_answer(majority, row):
    """The answer of `majority_answers` to this question; to one that training doesn't have, that
    of its answer type; "" where there is neither."""
    question = majority.get(("question", row["question"].strip()))
    return question or majority.get(("answer_type", row["answer_type"].strip()), "")


def _natural(text):
    """A key that sorts "q2" before "q10"."""
    return [int(t) if i % 2 else t for i, t in enumerate(re.split(r"(\d+)", text))]


# --- The evaluator ---


class Evaluator:
    """Asks a model every question of a split and writes what it said.

    Attributes:
      tokenizer: that of the model.
      outdir: folder of metrics.json and predictions.jsonl, or None.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        inputs,
        total=None,
        pred_kw=None,
        train_data=None,
        controls=CONTROLS,
        outdir=None,
        shuffle_seed=0,
    ):
        """Takes what to ask and how; `experiment.make_evaluators` opens the data.

        Args:
          model: `paligemma.Model`.
          tokenizer: a spec as for `pp.tokenizer.get_tokenizer`, or a tokenizer.
          inputs: an iterable of (batch, rows) like `input_pipeline.evaluation`, gone through once
            in a run. The pp must keep image, text, mask_ar, mask_input, question_id, question,
            answer, answer_type, and image_id and content_type where there are any.
          total: number of questions, for the progress bar.
          pred_kw: arguments of `decode.generate`; max_new_tokens is 32 if not given.
          train_data: training rows for the majority control: an iterable of dicts.
          controls: some of CONTROLS.
          outdir: where to write; None writes nothing.
          shuffle_seed: of the images' permutation.

        Raises:
          ValueError: an unknown control, or one without what it needs.
        """
        if isinstance(tokenizer, str):
            from paligemma_med.pp.tokenizer import get_tokenizer

            tokenizer = get_tokenizer(tokenizer)
        if unknown := [c for c in controls if c not in CONTROLS]:
            raise ValueError(f"controls has {unknown[0]!r}; expected some of {list(CONTROLS)}.")
        self._total = total
        self.tokenizer = tokenizer
        self.outdir = outdir and pathlib.Path(outdir)
        self._model = model
        self._inputs = inputs
        self._pred_kw = {"max_new_tokens": 32, **(pred_kw or {})}
        self._controls = tuple(controls)
        self._shuffle_seed = shuffle_seed
        if "majority" in controls:
            if train_data is None:
                raise ValueError("the majority control needs train_data, found None.")
            self._majority = majority_answers(_training_rows(train_data))

    def run(self, params):
        """Evaluates these parameters.

        Returns:
          {name: number}. Names are `{who}/{group}/{figure}`: who is "model" or a control; group is
          "overall", "answer_type/CLOSED", "content_type/Organ", …; figure is acc, acc_strict,
          acc_set (fractions), acc_low, acc_high (95 %, Wilson). Then n (questions) and
          `n/{group}`; truncated (prompts that lost tokens; where the input counts them) and
          unfinished (the model's answers, all samples, without EOS within max_new_tokens).

        Writes (both whole or not at all), if there is an outdir:
          metrics.json: the same.
          predictions.jsonl: a line a question, in the order of the split: question_id, image_id,
            question, prompt (as the model read it), answer, answer_type, content_type,
            predictions (one a sample), logprobs (the log-probability of each, EOS included),
            correct, correct_strict, correct_set; and per control majority_prediction,
            shuffled_images_predictions, shuffled_images_logprobs, shuffled_images_image_id and
            {control}_correct, …_strict, …_set.

        Raises:
          ValueError: a row without a key it needs or with a key that leaks the answer, an empty
            answer, no questions, fewer than two images to shuffle.
        """
        self._check_vocabulary(params)
        rows, unfinished = [], 0
        with tempfile.TemporaryDirectory(prefix="vqa-images-") as folder:
            images = _Images(folder) if "shuffled_images" in self._controls else None
            batches = []
            with self._progress("vqa", self._total) as progress:
                for batch, batch_rows in self._inputs:
                    _check_rows(batch, batch_rows)
                    prompts = self._prompts(batch)
                    texts, logprobs, cut = self._ask(params, batch, batch_rows)
                    unfinished += cut
                    for row, *rest in zip(batch_rows, prompts, texts, logprobs):
                        rows.append(_prediction(row, *rest))
                    if images is not None:
                        keys = images.add(distributed.to_host(batch["image"]), batch_rows)
                        kept = {k: v for k, v in batch.items() if k != "image"}
                        where = getattr(batch["image"], "sharding", None)
                        batches.append((kept, where, batch_rows, keys))
                    progress.update(len(batch_rows))
            if not rows:
                raise ValueError("there are no questions to evaluate on.")
            if images is not None:
                self._ask_with_other_images(params, images, batches, rows)
        if "majority" in self._controls:
            for row in rows:
                row["majority_prediction"] = majority_answer(self._majority, row)
                row |= _correct(row["majority_prediction"], row["answer"], "majority_")

        metrics = summarise(rows, ("model", *self._controls))
        truncated = getattr(self._inputs, "stats", {}).get("truncated")
        if truncated is not None:
            metrics["truncated"] = int(truncated)
        metrics["unfinished"] = unfinished
        if self.outdir and distributed.is_main():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            _write(self.outdir / "predictions.jsonl", "".join(lines))
            _write(self.outdir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        return metrics

    def _ask(self, params, batch, rows):
        """→ ([row][sample] texts, [row][sample] log-probabilities, answers without EOS), valid
        rows only."""
        # A question's own number, so that its samples are the same in any split, slice and batch.
        ids = np.zeros(batch["text"].shape[0], np.uint32)
        ids[: len(rows)] = [zlib.crc32(str(row["question_id"]).encode()) for row in rows]
        eos = self.tokenizer.eos_token
        kw = {"eos_token": eos, **self._pred_kw}
        tokens, logprobs = decode.generate(self._model, params, {**batch, "row_id": ids}, **kw)
        tokens, logprobs = (x[: len(rows)] for x in distributed.to_host((tokens, logprobs)))
        # What is scored are new tokens alone; `generate` never gives the prompt's back.
        assert tokens.shape[1:] == (kw.get("num_samples", 1), kw["max_new_tokens"])
        texts = [[self.tokenizer.to_str(sample) for sample in row] for row in tokens]
        totals = logprobs.sum(axis=-1)
        cut = int(np.sum(~(tokens == kw["eos_token"]).any(axis=-1)))
        return texts, [[round(float(x), 6) for x in row] for row in totals], cut

    def _ask_with_other_images(self, params, images, batches, rows):
        other = images.derangement(self._shuffle_seed)
        results = iter(rows)
        with self._progress("vqa, images shuffled", len(rows)) as progress:
            for batch, sharding, batch_rows, keys in batches:
                keys = [other[key] for key in keys]
                image = np.stack([images.load(key) for key in keys])
                filler = batch["text"].shape[0] - len(keys)
                image = np.concatenate([image, np.repeat(image[:1], filler, axis=0)])
                if sharding is not None:
                    image = distributed.place(image, sharding)
                texts, logprobs, _ = self._ask(params, {**batch, "image": image}, batch_rows)
                for key, text, logprob in zip(keys, texts, logprobs):
                    row = next(results)
                    row["shuffled_images_image_id"] = images.image_id[key]
                    row["shuffled_images_predictions"] = text
                    row["shuffled_images_logprobs"] = logprob
                    row |= _correct(text[0], row["answer"], "shuffled_images_")
                progress.update(len(batch_rows))

    def _prompts(self, batch):
        """The text that the model reads, per row."""
        text, mask = distributed.to_host((batch["text"], batch["mask_input"]))
        return [
            self.tokenizer.to_str(t[m], stop_at_eos=False) for t, m in zip(text, mask.astype(bool))
        ]

    def _check_vocabulary(self, params):
        known, said = self.tokenizer.vocab_size, decode.vocab_size(params)
        if said and said > known:
            raise ValueError(
                f"the model can say {said} tokens, but the tokenizer knows {known}: "
                "it is not the model's, or lacks tokensets=('loc', 'seg')."
            )

    def _progress(self, what, total):
        if not distributed.is_main():
            return tqdm.tqdm(disable=True)
        if sys.stderr.isatty():
            return tqdm.tqdm(total=total, desc=what, unit="q", leave=False)
        form = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left, {rate_fmt}"
        return tqdm.tqdm(
            total=total, desc=what, unit="q", mininterval=30, bar_format=form, file=_Lines()
        )


class _Lines(io.TextIOBase):
    """A log file for tqdm: a line for each state, none drawn over."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)


def _check_rows(batch, rows):
    valid = distributed.to_host(batch["_mask"]) if "_mask" in batch else np.ones(len(rows))
    if not np.array_equal(np.flatnonzero(valid), np.arange(len(rows))):
        raise ValueError(f"_mask is {valid} for {len(rows)} rows; expected the valid ones first.")
    for row in rows:
        where = f"question {row.get('question_id')!r}"
        if missing := [k for k in NEEDED if k not in row]:
            raise ValueError(
                f"{where} has no {missing[0]!r}, found {sorted(row)}; "
                "add it to the keep(...) of pp_fn."
            )
        if "suffix" in row:
            raise ValueError(
                f"{where} has a key 'suffix', which an eval pp would put into the prompt; "
                "call the ground truth 'answer'."
            )
        if not normalise(row["answer"]):
            raise ValueError(f"{where} has an empty answer: {row['answer']!r}.")


class _Images:
    """The different images of a split, kept in files between the two passes.

    On disk because 2,000 of 448 px would be 4.8 GB; exact, because a control that differs by
    rounding would be a different experiment. Images are told apart by content: should one picture
    have two ids, no question gets its own back under the other.
    """

    def __init__(self, folder):
        self.image_id = {}  # content key → id of the first row that had it
        self._folder = pathlib.Path(folder)

    def add(self, image, rows):
        """float[B, height, width, 3] → content key of each valid row."""
        keys = []
        for pixels, row in zip(image, rows):
            key = hashlib.sha1(np.ascontiguousarray(pixels)).hexdigest()
            if key not in self.image_id:
                if "image_id" not in row:
                    raise ValueError(
                        f"question {row['question_id']!r} has no 'image_id', which shuffling the "
                        "images needs; add it to the keep(...) of pp_fn."
                    )
                np.save(self._folder / f"{key}.npy", pixels)
                self.image_id[key] = row["image_id"]
            keys.append(key)
        return keys

    def load(self, key):
        return np.load(self._folder / f"{key}.npy")

    def derangement(self, seed):
        """{key: key of the image to show instead}: each gets the next on a random ring, so that
        every image is used once and none stays in its place."""
        if len(self.image_id) < 2:
            raise ValueError("shuffling images between questions needs two different images.")
        keys = sorted(self.image_id)
        ring = np.random.default_rng(seed).permutation(len(keys))
        return {keys[a]: keys[b] for a, b in zip(ring, np.roll(ring, 1))}


def _training_rows(train_data):
    rows = []
    for row in train_data:
        if missing := [k for k in NEEDED if k not in row]:
            raise ValueError(f"a row of train_data has no {missing[0]!r}, found {sorted(row)}.")
        rows.append({k: row[k] for k in NEEDED})  # not its image
    return rows


def _prediction(row, prompt, predictions, logprobs):
    return dict(
        question_id=row["question_id"],
        image_id=row.get("image_id"),
        question=row["question"],
        prompt=prompt,
        answer=row["answer"],
        answer_type=row["answer_type"],
        content_type=row.get("content_type"),
        predictions=predictions,
        logprobs=logprobs,
        **_correct(predictions[0], row["answer"]),
    )


def _correct(prediction, answer, prefix=""):
    return {
        prefix + figure.replace("acc", "correct"): correct
        for figure, correct in score(prediction, answer).items()
    }


def _write(path, text):
    """Whole or not at all: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# --- Figures and table ---


def summarise(rows, columns=("model", *CONTROLS)):
    """Figures of `Evaluator.run` from rows of predictions.jsonl."""
    groups = {"overall": rows}
    for key in ("answer_type", "content_type"):
        for value in sorted({str(row[key]) for row in rows if row.get(key)}):
            groups[f"{key}/{value}"] = [row for row in rows if row.get(key) == value]
    metrics = {"n": len(rows)}
    for group, members in groups.items():
        if group != "overall":
            metrics[f"n/{group}"] = len(members)
        for who in columns:
            prefix = "" if who == "model" else f"{who}_"
            for figure in FIGURES:
                key = prefix + figure.replace("acc", "correct")
                metrics[f"{who}/{group}/{figure}"] = sum(r[key] for r in members) / len(members)
            hits = sum(row[f"{prefix}correct"] for row in members)
            low, high = stats.wilson(hits, len(members))
            metrics[f"{who}/{group}/acc_low"], metrics[f"{who}/{group}/acc_high"] = low, high
    return metrics


def format_table(metrics):
    """Figures of `Evaluator.run` as a Markdown table: percent and 95 % interval."""
    names = {"model": "model", "majority": "majority answer", "shuffled_images": "images shuffled"}
    columns = [who for who in names if f"{who}/overall/acc" in metrics]
    groups = [("overall", metrics["n"])]
    groups += [(k.removeprefix("n/"), n) for k, n in metrics.items() if k.startswith("n/")]

    def cell(who, group):
        acc, low, high = (
            100 * metrics[f"{who}/{group}/{figure}"] for figure in ("acc", "acc_low", "acc_high")
        )
        return f"{acc:.1f} ({low:.1f}–{high:.1f})"

    table = [["exact match, %", *(names[who] for who in columns), "n"]]
    for group, n in groups:
        title = group.partition("/")[2] or group
        table.append([title, *(cell(who, group) for who in columns), f"{n:,}"])
    for figure, title in (("acc_strict", "overall, strict"), ("acc_set", "overall, any order")):
        values = (f"{100 * metrics[f'{who}/overall/{figure}']:.1f}" for who in columns)
        table.append([title, *values, f"{metrics['n']:,}"])

    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        for row in table
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
