"""Visual question answering: asks a model every question of a split, and writes its answers.

An accuracy alone says little: many questions can be answered without the image, so a model may ignore it
and score well. So controls are computed in the same run and shown in the same table: `controls` explains
them, `scoring` the figures, `results` the files and how an interrupted evaluation resumes.

Each process keeps the images for the shuffled control in a temporary folder of its own (2.4 MB an
image of 448 px), since any image may be asked for next.
"""

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np

from paligemma_med import decode
from paligemma_med.evaluation import controls as controls_lib
from paligemma_med.evaluation import evaluator, questions
from paligemma_med.metrics import protocols, scoring
from paligemma_med.parallel import distributed, notes
from paligemma_med.pp import rows as row_keys

# The default controls: one pass in addition to the model's own.
CONTROLS = ("majority", "majority_type", "echo", "shuffled_images")
NEEDED = row_keys.NEEDED
ARRAYS = ("image", "text", "mask_ar", "mask_input")
PROGRAM = "answers"  # what it has a model compute: one of `forecast.PROGRAMS`


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Evaluator(evaluator.Evaluator):
    """Asks every question once, and once more for each control that takes another image.

    Arguments besides those of `evaluation.evaluator.Evaluator`:
      choices: keys of a row that hold the texts of its choices A, B, …, which the row then has as
        `choices`; it must have `answer_letter`, too.
      options: "letter" or "text": what of each choice is scored as a continuation of the prompt; ""
        scores nothing.
      answer_prefix: what training put before an answer, such as a blank; options are scored with it.
      shuffle_seed: of the images' permutation.
      noise_seed: of noise_image.

    Raises:
      ValueError: as the base class; options that are unknown, or without choices.
    """

    controls: Sequence[str] = CONTROLS
    choices: Sequence[str] = ()
    options: str = ""
    answer_prefix: str = ""
    shuffle_seed: int = 0
    noise_seed: int = 0

    def __post_init__(self):
        evaluator.check_names("options", [self.options], ("", "letter", "text"))
        if self.options and not self.choices:
            raise ValueError(f"options={self.options!r} scores choices, but choices names no keys.")
        super().__post_init__()
        self.choices = tuple(self.choices)

    def answered(self, params, part, folder) -> list[dict]:
        """See the base class."""
        images = controls_lib.Images(folder) if "shuffled_images" in self.controls else None
        rows, batches = [], []
        with self.progress("vqa", self.total) as progress:
            for i, (batch, source) in enumerate(self.inputs):
                questions.check(batch, source)
                pixels = distributed.to_host(batch["image"])
                asked = self.lines(batch, source, pixels, self.choices)
                done = questions.checked(part.saved.get(("model", i)), asked)
                if done is None:
                    done = self._ask_all(params, batch, asked, pixels)
                    part.add("model", i, done)
                rows += done
                if images is not None:
                    for image, line, row in zip(pixels, asked, source):
                        images.add(image, line["image_key"], row)
                    batches.append((batch | {"image": evaluator.Placement(batch["image"])}, done))
                progress.update(len(source))
        if not rows:
            raise ValueError("there are no questions to evaluate on.")
        if images is not None and len(images.image_id) > 1:
            self._shuffled(params, images, batches, part, len(rows))
        elif images is not None:
            notes.say(controls_lib.ONE_IMAGE, file=sys.stderr)
        return rows

    def ask(self, params, batch, rows) -> list[dict]:
        """As the base class; where options are scored, with option_logprobs and option_tokens."""
        out = super().ask(params, batch, rows)
        if self.options:
            texts = [row["choices"] for row in rows]
            if self.options == "letter":
                texts = [[protocols.letter_of(i) for i in range(len(x))] for x in texts]
            texts = [[self.answer_prefix + text for text in row] for row in texts]
            scores = decode.score_choices(self.model, params, batch, texts, self.tokenizer)
            for answer, logprobs, lengths in zip(out, *scores):
                answer["option_logprobs"] = [round(x, 6) for x in logprobs]
                answer["option_tokens"] = lengths
        return out

    def _ask_all(self, params, batch, asked, pixels):
        """The rows of a batch, with answers and all controls but the shuffled one."""
        rows = [a | b for a, b in zip(asked, self.ask(params, batch, asked))]
        for row in rows:
            row |= scoring.correct(row["predictions"][0], scoring.truths(row))
        where = evaluator.Placement(batch["image"])
        for who in self.controls:
            if who in scoring.ONE_TEXT:
                self.add_text_control(who, rows)
            elif who != "shuffled_images":
                keys = [row["image_key"] for row in rows]
                images = self._other_images(who, pixels.shape[1:], keys)
                self._ask_with(params, batch | {"image": where}, images, who, rows)
        return rows

    def _other_images(self, who, shape, keys):
        if who == "blank_image":
            return [decode.blank_image(shape)] * len(keys)
        noise = {key: controls_lib.noise_image(shape, key, self.noise_seed) for key in {*keys}}
        return [noise[key] for key in keys]

    def _shuffled(self, params, images, batches, part, total):
        """The second pass: each question with another question's image."""
        other = images.derangement(self.shuffle_seed)
        who = "shuffled_images"
        with self.progress("vqa, images shuffled", total) as progress:
            for i, (batch, rows) in enumerate(batches):
                done = part.saved.get((who, i))
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

    def _ask_with(self, params, batch, images, who, rows):
        """Adds the model's answers with other images, a list of one a row; the batch has a Placement
        in the place of its own."""
        image = np.stack(images)
        filler = batch["text"].shape[0] - len(image)
        image = np.concatenate([image, np.repeat(image[:1], filler, axis=0)])
        answers = self.ask(params, {**batch, "image": batch["image"].put(image)}, rows)
        for row, answer in zip(rows, answers):
            answer = {k: v for k, v in answer.items() if k not in ("unfinished", "option_tokens")}
            row |= {f"{who}_{k}": v for k, v in answer.items()}
            row |= scoring.correct(answer["predictions"][0], scoring.truths(row), f"{who}_")
