"""Several questions on one image, one after another: do earlier turns affect a model's answers?

Benchmarks ask each question separately; people keep asking. Here k questions of a split on one image, in
the order of their ids, become a dialogue of k turns, and every turn's prompt contains the previous turns:
question and answer of each in the form used in training, then the new question. Three ways of asking are
compared, over the same questions:

  model         the history holds the model's own answers: a dialogue as it would happen.
  true_history  the history holds the true answers: what a history does when it is right.
  single_turn   no history: what the usual evaluation asks. Turn 1 is the same in all three.

Compare by turn (`{who}/turn/2/acc`): if model is below single_turn, the history confuses it; if below
true_history, wrong answers are carried on. A true history can also give an answer away ("Is it a CT?" after
"Which modality?"), so a gain from it isn't a gain in seeing. A model trained on single questions has never
seen a history, and this measures how it copes.

An image is encoded once for all of its dialogues, turns and ways (`decode.encode_images`). Each prompt is
read again, since image tokens see the prompt in a prefix-LM. Of several samples, the first goes into the
history.

Everything else (files, resuming, several processes, figures, text controls) is the base class'. The split's
images are kept in a temporary folder, as for the shuffled control of `vqa`.
"""

import dataclasses
import math
import zlib

import numpy as np

from paligemma_med import decode
from paligemma_med.evaluation import controls as controls_lib
from paligemma_med.evaluation import evaluator, questions
from paligemma_med.metrics import scoring
from paligemma_med.metrics.answers import without_thought
from paligemma_med.parallel import distributed
from paligemma_med.pp import get_preprocess_fn
from paligemma_med.pp import rows as row_keys

NEEDED = (*row_keys.NEEDED, "image_id")
ARRAYS = ("image", "text", "mask_ar", "mask_input")
PROGRAM = "dialogues"  # what it has a model compute: one of `forecast.PROGRAMS`
_TEXT = ("text", "mask_ar", "mask_input", "image_at")  # the last where the image isn't in front


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Evaluator(evaluator.Evaluator):
    """Asks dialogues; see the top of this file, and the base class for `run`.

    Rows of predictions.jsonl have these keys beside those of `vqa`: dialogue_id (the question_id of
    its first turn), turn (from 1), and for true_history and single_turn {who}_prompt,
    {who}_predictions, {who}_logprobs and {who}_correct, …_strict, …_set. `prompt` is that of
    `model`, history included, and tokens_cut what it lost.

    Arguments besides those of `evaluation.evaluator.Evaluator`, of which inputs must keep image_id,
    and controls are some of scoring.TEXT_CONTROLS; `configs.common.dialogue_eval` writes the pp
    strings:
      prompt_pp: pp of a row's texts and "history" int32[n], the tokens of the turns before (none at
        turn 1); gives text, mask_ar, mask_input of one length.
      history_pp: pp of a row's texts, with the answer given in place of the true one; gives "text",
        the tokens of this turn in the history of later ones.
      turns: k. Of an image's n questions, sorted by question_id, n // k dialogues are made of k
        consecutive ones each; questions that are left over are not asked.
      dialogue_seed: which ones are left over is drawn for each image by this and its id.

    Raises:
      ValueError: as the base class; turns below 2; a control that takes another image.
    """

    prompt_pp: str
    history_pp: str
    turns: int = 3
    dialogue_seed: int = 0

    def __post_init__(self):
        if not isinstance(self.turns, int) or self.turns < 2:
            raise ValueError(f"turns is {self.turns!r}; expected 2 or more.")
        if others := [c for c in self.controls if c in scoring.IMAGE_CONTROLS]:
            raise ValueError(f"controls has {others[0]!r}; dialogues have {list(scoring.TEXT_CONTROLS)}.")
        super().__post_init__()
        self._prompt_fn, self._history_fn = map(get_preprocess_fn, (self.prompt_pp, self.history_pp))

    @property
    def columns(self) -> tuple[str, ...]:
        """The controls, and the other ways of asking."""
        return (*self.controls, *scoring.HISTORIES)

    def answered(self, params, part, folder) -> list[dict]:
        """See the base class; a batch of `part` is one of dialogues."""
        rows, images = [], controls_lib.Images(folder)
        place, size, lines = self._read(images)
        dialogues = [turns for of_image in lines.values() for turns in self._cut(of_image)]
        if not dialogues:
            raise ValueError(f"no image of the split has {self.turns} questions: there are no dialogues.")
        keys = [turns[0]["image_key"] for turns in dialogues]
        encode = self._encoder(params, place["image"], size, images, list(dict.fromkeys(keys)))
        for i in range(math.ceil(len(dialogues) / size)):
            some = dialogues[i * size : (i + 1) * size]
            asked = [
                line | dict(dialogue_id=turns[0]["question_id"], turn=t)
                for turns in some
                for t, line in enumerate(turns, 1)
            ]
            done = questions.checked(part.saved.get(("model", i)), asked)
            if done is None:
                answers = self._hold(params, place, size, encode, some)
                done = [line | answer for line, answer in zip(asked, answers, strict=True)]
                for row in done:
                    row |= scoring.correct(row["predictions"][0], scoring.truths(row))
                for who in self.controls:
                    self.add_text_control(who, done)
                part.add("model", i, done)
            rows += done
        return rows

    # --- Which dialogues ---

    def _read(self, images):
        """Goes through the split → (where arrays go: key → Placement, batch size, image_id → the
        first keys of its questions' lines); pixels are added to `images`."""
        place, size, lines = None, 0, {}
        with self.progress("reading", self.total) as progress:
            for batch, source in self.inputs:
                questions.check(batch, source)
                place = {k: evaluator.Placement(batch[k]) for k in ("image", *_TEXT) if k in batch}
                size = batch["text"].shape[0]
                pixels = distributed.to_host(batch["image"])
                for i, line in enumerate(self.lines(batch, source, pixels)):
                    images.add(pixels[i], line["image_key"], source[i])
                    # Its prompt is that of the question asked by itself.
                    line = {k: v for k, v in line.items() if k not in ("prompt", "tokens_cut")}
                    lines.setdefault(line["image_id"], []).append(line)
                progress.update(len(source))
        return place, size, lines

    def _cut(self, lines):
        """The dialogues of an image's questions, each a list of k lines."""
        lines = sorted(lines, key=lambda line: questions.natural_key(str(line["question_id"])))
        if len(lines) < self.turns:
            return []
        # By the image alone, so that it has the same dialogues in any part of a split.
        key = zlib.crc32(str(lines[0]["image_id"]).encode())
        rng = np.random.default_rng([self.dialogue_seed, key])
        first = rng.integers(len(lines) % self.turns + 1)
        starts = range(first, len(lines) - self.turns + 1, self.turns)
        return [lines[i : i + self.turns] for i in starts]

    # --- Asking ---

    def _encoder(self, params, place, size, images, order):
        """A function from keys of images to their tokens float[len(keys), P, D]. They are encoded
        `size` at a time, in the order in which they will be asked for, and kept until then."""
        cache = {}

        def encode(keys):
            while missing := [key for key in keys if key not in cache]:
                for key in {*cache} - {*keys}:  # the order is past them
                    del cache[key]
                start = order.index(missing[0])
                ahead = order[start : start + size]
                pixels = [images.load(key) for key in ahead]
                pixels = np.stack(pixels + pixels[:1] * (size - len(ahead)))
                tokens = decode.encode_images(self.model, params, place.put(pixels))
                cache.update(zip(ahead, distributed.to_host(tokens)))
            return np.stack([cache[key] for key in keys])

        return encode

    def _hold(self, params, place, size, encode, dialogues):
        """Holds the dialogues of a batch: a dict of answers for each turn of each, in order."""
        fill = [*range(len(dialogues)), *[0] * (size - len(dialogues))]
        zimg = encode([dialogues[i][0]["image_key"] for i in fill])
        batch = dict(
            zimg=place["image"].put(zimg),
            _mask=np.arange(size) < len(dialogues),
        )
        none = np.zeros(0, np.int32)
        history = {who: [none] * len(dialogues) for who in ("model", *scoring.HISTORIES)}
        out = [[{} for _ in range(self.turns)] for _ in dialogues]
        for t in range(self.turns):
            lines = [turns[t] for turns in dialogues]
            for who, before in history.items():
                if t and who == "single_turn":
                    before = [none] * len(dialogues)
                if t or who == "model":
                    text, prompts, cut = self._prompts(lines, before)
                    text = {k: place[k].put(x[fill]) for k, x in text.items()}
                    answers = self.ask(params, {**batch, **text}, lines)
                for i, line in enumerate(lines):
                    first = without_thought(answers[i]["predictions"][0])
                    if who == "model":
                        out[i][t] |= {**answers[i], "prompt": prompts[i], "tokens_cut": cut[i]}
                        answer = first
                    else:
                        new = dict(prompt=prompts[i], **answers[i])
                        new = {f"{who}_{k}": v for k, v in new.items() if k != "unfinished"}
                        out[i][t] |= new | scoring.correct(first, scoring.truths(line), f"{who}_")
                        answer = line["answer"]
                    turn = self._history_fn({**line, "answer": answer})["text"]
                    history[who][i] = np.concatenate([history[who][i], turn])
        return [answer for turns in out for answer in turns]

    def _prompts(self, lines, history):
        """(key → int32[rows, T], the prompts as texts, tokens that each lost)."""
        rows = [self._prompt_fn({**line, "history": h}) for line, h in zip(lines, history)]
        arrays = {k: np.stack([row[k] for row in rows]) for k in _TEXT if k in rows[0]}
        texts = [self.tokenizer.to_str(row["text"][row["mask_input"] > 0], stop_at_eos=False) for row in rows]
        return arrays, texts, [int(row.get("_truncated", 0)) for row in rows]
