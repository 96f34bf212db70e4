"""Several questions on one image, one after another: does a model keep its answers apart, or up?

Benchmarks ask each question for itself; people go on asking. Here k questions of a split on one
image, in the order of their ids, become a dialogue of k turns, and every turn's prompt holds the
turns before it: question and answer of each in the form that training gives them, then the new
question.
Three ways of asking stand side by side, over the same questions:

  model         the history holds the model's own answers: a dialogue as it would happen.
  true_history  the history holds the true answers: what a history does when it is right.
  single_turn   no history: what the usual evaluation asks. Turn 1 is the same in all three.

Read by turn (`{who}/turn/2/acc`): if model falls behind single_turn, the history confuses; behind
true_history, wrong answers are carried on. A true history can also give an answer away ("Is it a
CT?" after "Which modality?"), so its gain is no gain in seeing. A model that was trained on single
questions has never seen a history; that is what is measured then.

An image is encoded once, whatever its dialogues, turns and ways (`decode.encode_images`). Prompts
are each read anew, as image tokens see the prompt in a prefix-LM. Of several samples the first goes
into the history.

All else (files, resume, several processes, figures, the controls that are texts) is `vqa`'s. As
there for the shuffled control, the split's images wait in a temporary folder.
"""

import math
import zlib

import numpy as np

from paligemma_med import decode
from paligemma_med.evaluation import controls as controls_lib
from paligemma_med.evaluators import vqa
from paligemma_med.metrics import scoring
from paligemma_med.parallel import distributed
from paligemma_med.pp import get_preprocess_fn

NEEDED = (*vqa.NEEDED, "image_id")
_TEXT = ("text", "mask_ar", "mask_input")


class Evaluator(vqa.Evaluator):
    """Asks dialogues; see the top of this file, and `vqa.Evaluator` for `run` and the attributes.

    Rows of predictions.jsonl have these keys beside those of `vqa`: dialogue_id (the question_id of
    its first turn), turn (from 1), and for true_history and single_turn {who}_prompt,
    {who}_predictions, {who}_logprobs and {who}_correct, …_strict, …_set. `prompt` is that of
    `model`, history included, and tokens_cut what it lost.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        inputs,
        prompt_pp,
        history_pp,
        turns=3,
        dialogue_seed=0,
        total=None,
        pred_kw=None,
        train_data=None,
        controls=scoring.TEXT_CONTROLS,
        protocol="vqa",
        groups=scoring.GROUPS,
        outdir=None,
        about=None,
    ):
        """Takes what to ask and how; `configs.common.dialogue_eval` writes the pp strings.

        Args:
          inputs: as for `vqa.Evaluator`; image_id says which questions are on one image.
          prompt_pp: pp of a row's texts and "history" int32[n], the tokens of the turns before
            (none at turn 1); gives text, mask_ar, mask_input of one length.
          history_pp: pp of a row's texts, the answer given in place of the true one; gives "text",
            the tokens of this turn in the history of later ones.
          turns: k. Of an image's n questions, sorted by question_id, n // k dialogues are made of k
            consecutive ones each; questions that are left over are not asked.
          dialogue_seed: which ones are left over is drawn for each image by this and its id.
          Others: as for `vqa.Evaluator`. controls: some of scoring.TEXT_CONTROLS.

        Raises:
          ValueError: as `vqa.Evaluator`; turns below 2; a control that takes another image.
        """
        if not isinstance(turns, int) or turns < 2:
            raise ValueError(f"turns is {turns!r}; expected 2 or more.")
        if others := [c for c in controls if c in scoring.IMAGE_CONTROLS]:
            raise ValueError(f"controls has {others[0]!r}; dialogues have {list(scoring.TEXT_CONTROLS)}.")
        super().__init__(
            model,
            tokenizer,
            inputs=inputs,
            total=total,
            pred_kw=pred_kw,
            train_data=train_data,
            controls=controls,
            protocol=protocol,
            groups=groups,
            outdir=outdir,
            about=about,
        )
        self._texts = self._controls
        self._controls = (*self._texts, *scoring.HISTORIES)
        self._prompt_pp, self._history_pp = map(get_preprocess_fn, (prompt_pp, history_pp))
        self._turns, self._dialogue_seed = turns, dialogue_seed

    def _all_rows(self, params, part, folder):
        rows, images = [], controls_lib.Images(folder)
        place, size, lines = self._read(images)
        dialogues = [turns for of_image in lines.values() for turns in self._cut(of_image)]
        if not dialogues:
            raise ValueError(f"no image of the split has {self._turns} questions: there are no dialogues.")
        keys = [turns[0]["image_key"] for turns in dialogues]
        encoded = self._encoder(params, place["image"], size, images, list(dict.fromkeys(keys)))
        for i in range(math.ceil(len(dialogues) / size)):
            some = dialogues[i * size : (i + 1) * size]
            asked = [
                line | dict(dialogue_id=turns[0]["question_id"], turn=t)
                for turns in some
                for t, line in enumerate(turns, 1)
            ]
            done = vqa._same_questions(part.found.get(("model", i)), asked)
            if done is None:
                said = self._hold(params, place, size, encoded, some)
                done = [line | more for line, more in zip(asked, said, strict=True)]
                for row in done:
                    row |= scoring.correct(row["predictions"][0], row["answer"])
                for who in self._texts:
                    self._add_text(who, done)
                part.add("model", i, done)
            rows += done
        return rows

    # --- Which dialogues ---

    def _read(self, images):
        """Goes through the split → (where arrays go: key → vqa._Place, batch size, image_id → the
        first keys of its questions' lines); pixels are added to `images`."""
        place, size, lines = None, 0, {}
        with self._progress("reading", self._total) as progress:
            for batch, given in self._inputs:
                vqa._check_rows(batch, given)
                place = {k: vqa._Place(batch[k]) for k in ("image", *_TEXT)}
                size = batch["text"].shape[0]
                pixels = distributed.to_host(batch["image"])
                for i, line in enumerate(self._questions(batch, given, pixels)):
                    images.add(pixels[i], line["image_key"], given[i])
                    # Those are of the question asked by itself.
                    line = {k: v for k, v in line.items() if k not in ("prompt", "tokens_cut")}
                    lines.setdefault(line["image_id"], []).append(line)
                progress.update(len(given))
        return place, size, lines

    def _cut(self, lines):
        """The dialogues of an image's questions, each a list of k lines."""
        lines = sorted(lines, key=lambda line: controls_lib._natural(str(line["question_id"])))
        if len(lines) < self._turns:
            return []
        # By the image alone, so that it has the same dialogues in any part of a split.
        key = zlib.crc32(str(lines[0]["image_id"]).encode())
        rng = np.random.default_rng([self._dialogue_seed, key])
        first = rng.integers(len(lines) % self._turns + 1)
        starts = range(first, len(lines) - self._turns + 1, self._turns)
        return [lines[i : i + self._turns] for i in starts]

    # --- Asking ---

    def _encoder(self, params, place, size, images, order):
        """A function from keys of images to their tokens float[len(keys), P, D]. They are encoded
        `size` at a time, in the order in which they will be asked for, and kept until then."""
        cache = {}

        def encoded(keys):
            while missing := [key for key in keys if key not in cache]:
                for key in {*cache} - {*keys}:  # the order is past them
                    del cache[key]
                start = order.index(missing[0])
                ahead = order[start : start + size]
                pixels = [images.load(key) for key in ahead]
                pixels = np.stack(pixels + pixels[:1] * (size - len(ahead)))
                tokens = decode.encode_images(self._model, params, place.put(pixels))
                cache.update(zip(ahead, distributed.to_host(tokens)))
            return np.stack([cache[key] for key in keys])

        return encoded

    def _hold(self, params, place, size, encoded, dialogues):
        """What is said in dialogues: a dict for each turn of each, dialogue by dialogue."""
        fill = [*range(len(dialogues)), *[0] * (size - len(dialogues))]
        zimg = encoded([dialogues[i][0]["image_key"] for i in fill])
        batch = dict(
            zimg=place["image"].put(zimg),
            _mask=np.arange(size) < len(dialogues),
        )
        none = np.zeros(0, np.int32)
        history = {who: [none] * len(dialogues) for who in ("model", *scoring.HISTORIES)}
        out = [[{} for _ in range(self._turns)] for _ in dialogues]
        for t in range(self._turns):
            lines = [turns[t] for turns in dialogues]
            for who, before in history.items():
                if t and who == "single_turn":
                    before = [none] * len(dialogues)
                if t or who == "model":
                    text, prompts, cut = self._prompts(lines, before)
                    text = {k: place[k].put(x[fill]) for k, x in text.items()}
                    said = self._ask(params, {**batch, **text}, lines)
                for i, line in enumerate(lines):
                    if who == "model":
                        out[i][t] |= {**said[i], "prompt": prompts[i], "tokens_cut": cut[i]}
                        answer = said[i]["predictions"][0]
                    else:
                        new = dict(prompt=prompts[i], **said[i])
                        new = {f"{who}_{k}": v for k, v in new.items() if k != "unfinished"}
                        first = said[i]["predictions"][0]
                        out[i][t] |= new | scoring.correct(first, line["answer"], f"{who}_")
                        answer = line["answer"]
                    turn = self._history_pp({**line, "answer": answer})["text"]
                    history[who][i] = np.concatenate([history[who][i], turn])
        return [said for turns in out for said in turns]

    def _prompts(self, lines, history):
        """(key → int32[rows, T], the prompts as texts, tokens that each lost)."""
        made = [self._prompt_pp({**line, "history": h}) for line, h in zip(lines, history)]
        arrays = {k: np.stack([row[k] for row in made]) for k in _TEXT}
        texts = [self.tokenizer.to_str(row["text"][row["mask_input"] > 0], stop_at_eos=False) for row in made]
        return arrays, texts, [int(row.get("_truncated", 0)) for row in made]
