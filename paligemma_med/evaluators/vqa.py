"""Visual question answering: asks a model every question of a split, and writes what it said.

An accuracy alone says little: many questions can be answered without the image, so a model may
ignore it and score well. Controls stand in the same table, made in the same run; `controls` says
what each means, `scoring` what the figures are, `results` what the files are and how an evaluation
that was killed goes on.

In a run of several processes each gets all rows and answers, and comes to the same figures; the
first one writes them. Each keeps the images of its own shuffled control, in its own temporary
folder (2.4 MB an image of 448 px), since any image may be asked for next.
"""

import contextlib
import io
import pathlib
import sys
import tempfile
import zlib

import numpy as np
import tqdm

from paligemma_med import decode
from paligemma_med.evaluation import controls, results
from paligemma_med.metrics import answers, protocols, scoring
from paligemma_med.parallel import distributed

# Those of a config that says nothing: one pass more than the model's own.
CONTROLS = ("majority", "majority_type", "echo", "shuffled_images")
NEEDED = ("question_id", "question", "answer", "answer_type")
# Keys of a batch that are arrays of the model's, and not of the question.
_ARRAYS = ("image", "text", "mask_ar", "mask_input", "_mask")


class Evaluator:
    """Asks a model every question of a split and writes what it said.

    Attributes:
      tokenizer: that of the model.
      outdir: folder of metrics.json and predictions.jsonl, or None.
      resume: whether `run` goes on where an earlier run of the same was killed.
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
        protocol="vqa",
        choices=(),
        options="",
        groups=scoring.GROUPS,
        outdir=None,
        shuffle_seed=0,
        noise_seed=0,
        about=None,
    ):
        """Takes what to ask and how; `experiment.make_evaluators` opens the data.

        Args:
          model: `paligemma.Model`.
          tokenizer: a spec as for `pp.tokenizer.get_tokenizer`, or a tokenizer.
          inputs: an iterable of (batch, rows) like `input_pipeline.evaluation`, gone through once
            in a run. The pp must keep image, text, mask_ar, mask_input, question_id, question,
            answer, answer_type, and image_id where there is one; what else it keeps is written.
          total: number of questions, for the progress bar.
          pred_kw: arguments of `decode.generate`; max_new_tokens is 32 if not given.
          train_data: training rows for the majority controls: an iterable of dicts, read when they
            are first needed.
          controls: some of scoring.CONTROLS.
          protocol: one of scoring.PROTOCOLS.
          choices: keys of a row that hold the texts of its choices A, B, …, which the row then has
            as `choices`; it must have `answer_letter`, too.
          options: "letter" or "text": what of each choice is scored as a continuation of the
            prompt; "" scores nothing.
          groups: keys of a row by whose values the figures are broken down.
          outdir: where to write; None writes nothing.
          shuffle_seed: of the images' permutation.
          noise_seed: of noise_image.
          about: a function of the parameters that gives the dict about what is evaluated, for
            metrics.json. All of it but `checkpoint` and `command` decides whether an evaluation is
            the same as one that was killed; without it nothing is ever gone on with.

        Raises:
          ValueError: an unknown control or protocol, or a control without what it needs; several
            samples at temperature 0.
        """
        if isinstance(tokenizer, str):
            from paligemma_med.pp.tokenizer import get_tokenizer

            tokenizer = get_tokenizer(tokenizer)
        for what, names, known in (
            ("controls", controls, scoring.CONTROLS),
            ("protocol", [protocol], scoring.PROTOCOLS),
            ("options", [options], ("", "letter", "text")),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{what} has {unknown[0]!r}; expected some of {list(known)}.")
        kw = {"max_new_tokens": 32, **(pred_kw or {})}
        if kw.get("num_samples", 1) > 1 and not kw.get("temperature"):
            raise ValueError(
                f"pred_kw has num_samples={kw['num_samples']} at temperature 0, which are all the "
                "same answer and would pass for robust; set pred_kw.temperature."
            )
        if options and not choices:
            raise ValueError(f"options={options!r} scores choices, but choices names no keys.")
        if train_data is None and (lost := [c for c in controls if c.startswith("majority")]):
            raise ValueError(f"the {lost[0]} control needs train_data, found None.")
        self.tokenizer = tokenizer
        self.outdir = outdir and pathlib.Path(outdir)
        self.resume = True
        self._model = model
        self._inputs = inputs
        self._total = total
        self._pred_kw = kw
        self._controls = tuple(c for c in scoring.CONTROLS if c in controls)
        self._protocol, self._groups = protocol, tuple(groups)
        self._choices, self._options = tuple(choices), options
        self._shuffle_seed, self._noise_seed = shuffle_seed, noise_seed
        self._train_data, self._majority = train_data, None
        self._about = about

    def run(self, params):
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
            answer, no questions, fewer than two images to shuffle.
        """
        self._check_vocabulary()
        about = self._about(params) if self._about else {}
        about = about and {**about, "controls": self._controls}
        identity = {k: v for k, v in about.items() if k not in ("checkpoint", "command")}
        resume = bool(identity) and self.resume
        rows = results.finished(self.outdir, identity) if resume and self.outdir else None
        if rows is None:
            part = results.Part(self.outdir, identity, resume)
            with contextlib.closing(part), tempfile.TemporaryDirectory(prefix="vqa-") as folder:
                rows = self._all_rows(params, part, folder)
        elif distributed.is_main():
            print(f"{self.outdir} is there for these weights.", file=sys.stderr, flush=True)
        metrics = scoring.summarise(rows, self._protocol, self._controls, self._groups)
        if self.outdir:
            about = {
                "protocol": self._protocol,
                "groups": self._groups,
                "split_hash": results.split_hash(rows),
                "prompt_hash": results.prompt_hash(rows),
                **about,
            }
            results.write(self.outdir, rows, metrics, about)
        return metrics

    # --- Passes over the split ---

    def _all_rows(self, params, part, folder):
        """Rows of predictions.jsonl, as far as `part` hasn't them already."""
        images = controls.Images(folder) if "shuffled_images" in self._controls else None
        rows, kept = [], []
        with self._progress("vqa", self._total) as progress:
            for i, (batch, given) in enumerate(self._inputs):
                _check_rows(batch, given)
                pixels = distributed.to_host(batch["image"])
                asked = self._questions(batch, given, pixels)
                done = _same_questions(part.found.get(("model", i)), asked)
                if done is None:
                    done = self._ask_all(params, batch, asked, pixels)
                    part.add("model", i, done)
                rows += done
                if images is not None:
                    for image, row, source in zip(pixels, asked, given):
                        images.add(image, row["image_key"], source)
                    batch = {k: v for k, v in batch.items() if k != "image"} | {"image": _Place(batch["image"])}
                    kept.append((batch, done))
                progress.update(len(given))
        if not rows:
            raise ValueError("there are no questions to evaluate on.")
        if images is not None:
            self._shuffled(params, images, kept, part, len(rows))
        return rows

    def _ask_all(self, params, batch, asked, pixels):
        """The rows of a batch, with answers and all controls but the shuffled one."""
        rows = [a | b for a, b in zip(asked, self._ask(params, batch, asked))]
        for row in rows:
            row |= scoring.correct(row["predictions"][0], row["answer"])
        for who in self._controls:
            if who in scoring.TEXT_CONTROLS:
                self._add_text(who, rows)
            elif who != "shuffled_images":
                keys = [row["image_key"] for row in rows]
                image = self._other_images(who, pixels.shape[1:], keys)
                self._ask_with(params, batch, image, who, rows)
        return rows

    def _add_text(self, who, rows):
        if who.startswith("majority") and self._majority is None:
            self._majority = controls.majority_answers(_training_rows(self._train_data))
            self._train_data = None
        for row in rows:
            if who == "echo":
                said = row["question"]
            elif who == "majority":
                said = controls.majority_answer(self._majority, row)
            else:
                said = controls.majority_of_type(self._majority, row)
            row[f"{who}_prediction"] = said
            row |= scoring.correct(said, row["answer"], f"{who}_")

    def _other_images(self, who, shape, keys):
        if who == "blank_image":
            return [controls.blank_image(shape)] * len(keys)
        made = {key: controls.noise_image(shape, key, self._noise_seed) for key in {*keys}}
        return [made[key] for key in keys]

    def _shuffled(self, params, images, kept, part, total):
        other = images.derangement(self._shuffle_seed)
        who = "shuffled_images"
        with self._progress("vqa, images shuffled", total) as progress:
            for i, (batch, rows) in enumerate(kept):
                done = part.found.get((who, i))
                if done is None:
                    keys = [other[row["image_key"]] for row in rows]
                    before = [set(row) for row in rows]
                    for row, key in zip(rows, keys):
                        row[f"{who}_image_id"] = images.image_id[key]
                    self._ask_with(params, batch, [images.load(k) for k in keys], who, rows)
                    new = [{k: row[k] for k in row if k not in b} for row, b in zip(rows, before)]
                    part.add(who, i, new)
                else:
                    for row, new in zip(rows, done, strict=True):
                        row |= new
                progress.update(len(rows))

    def _ask_with(self, params, batch, image, who, rows):
        """Adds what the model says with other images, a list of one a row."""
        image = np.stack(image)
        filler = batch["text"].shape[0] - len(image)
        image = np.concatenate([image, np.repeat(image[:1], filler, axis=0)])
        where = batch["image"]
        where = where if isinstance(where, _Place) else _Place(where)
        found = self._ask(params, {**batch, "image": where.put(image)}, rows)
        for row, said in zip(rows, found):
            said = {k: v for k, v in said.items() if k not in ("unfinished", "option_tokens")}
            row |= {f"{who}_{k}": v for k, v in said.items()}
            row |= scoring.correct(said["predictions"][0], row["answer"], f"{who}_")

    def _ask(self, params, batch, rows):
        """→ a dict of predictions, logprobs and unfinished for each valid row."""
        # A question's own number, so that its samples are the same in any split, slice and batch.
        ids = np.zeros(batch["text"].shape[0], np.uint32)
        ids[: len(rows)] = [zlib.crc32(str(row["question_id"]).encode()) for row in rows]
        kw = {"eos_token": self.tokenizer.eos_token, **self._pred_kw}
        tokens, logprobs = decode.generate(self._model, params, {**batch, "row_id": ids}, **kw)
        tokens, logprobs = (x[: len(rows)] for x in distributed.to_host((tokens, logprobs)))
        # What is scored are new tokens alone; `generate` never gives the prompt's back.
        assert tokens.shape[1:] == (kw.get("num_samples", 1), kw["max_new_tokens"])
        out = [
            dict(
                predictions=[self.tokenizer.to_str(sample) for sample in samples],
                logprobs=[round(float(x), 6) for x in totals],
                unfinished=int(np.sum(~(samples == kw["eos_token"]).any(axis=-1))),
            )
            for samples, totals in zip(tokens, logprobs.sum(axis=-1))
        ]
        if self._options:
            found = self._option_scores(params, batch, rows)
            for said, logprobs, lengths in zip(out, *found):
                said["option_logprobs"] = [round(x, 6) for x in logprobs]
                said["option_tokens"] = lengths
        return out

    def _option_scores(self, params, batch, rows):
        choices = [row["choices"] for row in rows]
        if self._options == "letter":
            choices = [[protocols.letter_of(i) for i in range(len(x))] for x in choices]
        return decode.score_choices(self._model, params, batch, choices, self.tokenizer)

    def _questions(self, batch, rows, pixels):
        """What is known of each valid row before it is asked: the first keys of its line."""
        text, mask = distributed.to_host((batch["text"], batch["mask_input"]))
        numbers = {k: v for k, v in batch.items() if k not in _ARRAYS and v.ndim == 1}
        numbers = {k: v.tolist() for k, v in distributed.to_host(numbers).items()}
        cut = getattr(self._inputs, "cut", None)
        out = []
        for i, row in enumerate(rows):
            prompt = self.tokenizer.to_str(text[i][mask[i].astype(bool)], stop_at_eos=False)
            line = dict(
                question_id=row["question_id"],
                image_id=row.get("image_id"),
                image_key=controls.image_key(pixels[i]),
                question=row["question"],
                prompt=prompt,
                answer=row["answer"],
                answer_type=row["answer_type"],
            )
            more = row | {k: v[i] for k, v in numbers.items()}
            more = {k: v for k, v in more.items() if k not in line and k not in self._choices}
            line |= results.plain(more, f"question {row['question_id']!r}")
            if self._choices:
                line |= _choices(row, self._choices)
            if cut is not None:
                line["tokens_cut"] = int(cut[i])
            out.append(line)
        return out

    def _check_vocabulary(self):
        known, said = self.tokenizer.vocab_size, getattr(self._model, "vocab_size", None)
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
        return tqdm.tqdm(total=total, desc=what, unit="q", mininterval=30, bar_format=form, file=_Lines())


class _Lines(io.TextIOBase):
    """A log file for tqdm: a line for each state, none drawn over."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)


class _Place:
    """Where the images of a batch lie, without the images."""

    def __init__(self, image):
        self._sharding = getattr(image, "sharding", None)

    def put(self, image):
        return image if self._sharding is None else distributed.place(image, self._sharding)


def _same_questions(done, asked):
    """`done`, or None if there is nothing; ValueError if those are other questions."""
    if done is None:
        return None
    for a, b in zip(done, asked, strict=False):
        if len(done) != len(asked) or any(a.get(k) != v for k, v in b.items()):
            raise ValueError(
                f"{results.PART} has another question or image at {b['question_id']!r} than the "
                "split, which has changed since: start anew with --noresume."
            )
    return done


def _check_rows(batch, rows):
    valid = distributed.to_host(batch["_mask"]) if "_mask" in batch else np.ones(len(rows))
    if not np.array_equal(np.flatnonzero(valid), np.arange(len(rows))):
        raise ValueError(f"_mask is {valid} for {len(rows)} rows; expected the valid ones first.")
    for row in rows:
        where = f"question {row.get('question_id')!r}"
        if missing := [k for k in NEEDED if k not in row]:
            raise ValueError(f"{where} has no {missing[0]!r}, found {sorted(row)}; add it to the keep(...) of pp_fn.")
        if "suffix" in row:
            raise ValueError(
                f"{where} has a key 'suffix', which an eval pp would put into the prompt; "
                "call the ground truth 'answer'."
            )
        if not answers.normalise(row["answer"]):
            raise ValueError(f"{where} has an empty answer: {row['answer']!r}.")


def _choices(row, keys):
    """{choices, answer_letter} of a multiple-choice question."""
    where = f"question {row['question_id']!r}"
    if missing := [k for k in (*keys, "answer_letter") if k not in row]:
        raise ValueError(f"{where} has no {missing[0]!r}, found {sorted(row)}; add it to the keep(...) of pp_fn.")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(keys)]
    letter = row["answer_letter"].strip().upper()
    if letter not in letters or len(letter) != 1:
        raise ValueError(f"{where} has the answer_letter {row['answer_letter']!r}; expected one of {letters}.")
    return dict(choices=[row[k] for k in keys], answer_letter=letter)


def _training_rows(train_data):
    rows = []
    for row in train_data:
        if missing := [k for k in NEEDED if k not in row]:
            raise ValueError(f"a row of train_data has no {missing[0]!r}, found {sorted(row)}.")
        rows.append({k: row[k] for k in NEEDED})
    return rows
