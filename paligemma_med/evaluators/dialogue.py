"""Several questions on one image, one after another: does a model keep its answers apart, or up?

Benchmarks ask each question for itself; people go on asking. Here questions of a split that follow
one another on one image become a dialogue of k turns, and every turn's prompt holds the turns
before it: question and answer of each in the form that training gives them, then the new question.
Three ways of asking stand side by side, over the same questions:

  model         the history holds the model's own answers: a dialogue as it would happen.
  true_history  the history holds the true answers: what a history does when it is right.
  single_turn   no history: what the usual evaluation asks. Turn 1 is the same in all three.

Read by turn (`{who}/turn/2/acc`): if model falls behind single_turn, the history confuses; behind
true_history, wrong answers are carried on. A true history can also give an answer away ("Is it a
CT?" after "Which modality?"), so its gain is no gain in seeing. A model that was trained on single
questions has never seen a history; that is what is measured then.

Images are encoded once a dialogue, whatever the turns and ways (`decode.encode_images`). Prompts
are each read anew, as image tokens see the prompt in a prefix-LM. Of several samples the first goes
into the history.

All else (files, resume, several processes, figures, the controls that are texts) is `vqa`'s.
"""

import zlib

import numpy as np

from paligemma_med import decode, distributed
from paligemma_med.evaluators import scoring, vqa
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
          inputs: as for `vqa.Evaluator`; questions on one image must follow one another and have
            an image_id.
          prompt_pp: pp of a row's texts and "history" int32[n], the tokens of the turns before
            (none at turn 1); gives text, mask_ar, mask_input of one length.
          history_pp: pp of a row's texts, the answer given in place of the true one; gives "text",
            the tokens of this turn in the history of later ones.
          turns: k. Of an image's n questions in a row, n // k dialogues are made of k consecutive
            ones each; questions that are left over are not asked.
          dialogue_seed: which ones are left over is drawn for each image by this and its id.
          Others: as for `vqa.Evaluator`. controls: some of scoring.TEXT_CONTROLS.

        Raises:
          ValueError: as `vqa.Evaluator`; turns below 2; a control that takes another image.
        """
        if not isinstance(turns, int) or turns < 2:
            raise ValueError(f"turns is {turns!r}; expected 2 or more.")
        if others := [c for c in controls if c in scoring.IMAGE_CONTROLS]:
            raise ValueError(
                f"controls has {others[0]!r}; dialogues have {list(scoring.TEXT_CONTROLS)}."
            )
        super().__init__(
            model, tokenizer, inputs=inputs, total=total, pred_kw=pred_kw, train_data=train_data,
            controls=controls, protocol=protocol, groups=groups, outdir=outdir, about=about,
        )  # fmt: skip
        self._texts = self._controls
        self._controls = (*self._texts, *scoring.HISTORIES)
        self._prompt_pp, self._history_pp = map(get_preprocess_fn, (prompt_pp, history_pp))
        self._turns, self._dialogue_seed = turns, dialogue_seed

    def _all_rows(self, params, part, folder):
        del folder
        rows = []
        for i, (place, size, dialogues) in enumerate(self._batches()):
            asked = [
                line | dict(dialogue_id=turns[0]["question_id"], turn=t)
                for _, turns in dialogues
                for t, line in enumerate(turns, 1)
            ]
            done = vqa._same_questions(part.found.get(("model", i)), asked)
            if done is None:
                said = self._hold(params, place, size, dialogues)
                done = [line | more for line, more in zip(asked, said, strict=True)]
                for row in done:
                    row |= scoring.correct(row["predictions"][0], row["answer"])
                for who in self._texts:
                    self._add_text(who, done)
                part.add("model", i, done)
            rows += done
        if not rows:
            raise ValueError(
                f"no image has {self._turns} questions that follow one another in the split: "
                "there are no dialogues. Ask for fewer turns, or order the data by image."
            )
        return rows

    # --- Which dialogues ---

    def _batches(self):
        """(where arrays go: key → vqa._Place, batch size, [(pixels, lines of k turns), …])."""
        place, size, ready, group = None, 0, [], []
        with self._progress("dialogues", self._total) as progress:
            for batch, given in self._inputs:
                vqa._check_rows(batch, given)
                place = {k: vqa._Place(batch[k]) for k in ("image", *_TEXT)}
                size = batch["text"].shape[0]
                pixels = distributed.to_host(batch["image"])
                for i, line in enumerate(self._questions(batch, given, pixels)):
                    # Those of the question asked by itself.
                    line = {k: v for k, v in line.items() if k not in ("prompt", "tokens_cut")}
                    if line["image_id"] is None:
                        raise ValueError(
                            f"question {line['question_id']!r} has no 'image_id', which says what "
                            "belongs together; add it to the keep(...) of pp_fn."
                        )
                    if group and group[-1][1]["image_id"] != line["image_id"]:
                        ready += self._cut(group)
                        group = []
                    # One copy of the image serves all of its questions.
                    same = group and group[-1][1]["image_key"] == line["image_key"]
                    group.append((group[-1][0] if same else pixels[i].copy(), line))
                while len(ready) >= size:
                    yield place, size, ready[:size]
                    ready = ready[size:]
                progress.update(len(given))
        ready += self._cut(group)
        for i in range(0, len(ready), size or 1):
            yield place, size, ready[i : i + size]

    def _cut(self, group):
        """The dialogues of an image's questions [(pixels, line), …]."""
        if len(group) < self._turns:
            return []
        spare = len(group) % self._turns
        # By the image alone, so that it has the same dialogues in any part of a split.
        key = zlib.crc32(str(group[0][1]["image_id"]).encode())
        first = np.random.default_rng([self._dialogue_seed, key]).integers(spare + 1)
        starts = range(first, len(group) - self._turns + 1, self._turns)
        return [(group[i][0], [line for _, line in group[i : i + self._turns]]) for i in starts]

    # --- Asking ---

    def _hold(self, params, place, size, dialogues):
        """What is said in dialogues: a dict for each turn of each, dialogue by dialogue."""
        fill = [*range(len(dialogues)), *[0] * (size - len(dialogues))]
        image = place["image"].put(np.stack([dialogues[i][0] for i in fill]))
        batch = dict(
            zimg=decode.encode_images(self._model, params, image),
            _mask=np.arange(size) < len(dialogues),
        )
        none = np.zeros(0, np.int32)
        history = {who: [none] * len(dialogues) for who in ("model", *scoring.HISTORIES)}
        out = [[{} for _ in range(self._turns)] for _ in dialogues]
        for t in range(self._turns):
            lines = [turns[t] for _, turns in dialogues]
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
        texts = [
            self.tokenizer.to_str(row["text"][row["mask_input"] > 0], stop_at_eos=False)
            for row in made
        ]
        return arrays, texts, [int(row.get("_truncated", 0)) for row in made]
