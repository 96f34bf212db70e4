"""Asks a model behind a server every question of a split, and once more for each control.

Each pass goes through `judge.client`; all replies are kept in replies.jsonl of the evaluation's folder, by a digest of
what was asked, so that a killed evaluation asks nothing twice. The server's address is no part of it: the same model
may move. What the replies cost is in served.json, so that metrics.json is the same after a kill.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from paligemma_med import files
from paligemma_med.evaluation import controls as controls_lib
from paligemma_med.evaluation import evaluator, questions
from paligemma_med.evaluation import results as results_lib
from paligemma_med.judge import client as judge_client
from paligemma_med.judge import replies as replies_lib
from paligemma_med.judge.server import ServerError
from paligemma_med.metrics import scoring
from paligemma_med.parallel import notes
from paligemma_med.pp import rows as row_keys
from paligemma_med.served import pictures, templates

REPLIES, COSTS = "replies.jsonl", "served.json"
# Before a server is taken for one whose model must have an image.
_FAULTS_WITHOUT_IMAGE = 3


class _Shown(NamedTuple):
    """Of a row's image: its key and (height, width), whether its own bytes are sent, how many are, and their digest."""

    key: str
    size: tuple[int, int]
    plain: bool
    bytes: int
    digest: bytes


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Evaluator(evaluator.Evaluator):
    """Arguments besides those of the base class, whose model and tokenizer are None:

    inputs: a data source: len, [i] -> dict with "image" as bytes and texts.
    name: the model, as the server calls it.
    template: a `templates.Template`.
    keys: of the texts that a row of predictions.jsonl keeps.
    choices: keys of a row that hold the texts of its choices.
    client: further arguments of `judge_client.ask_all`: base_url, concurrency, ….
    """

    known_controls = (*scoring.CONTROLS, scoring.QUESTION_ONLY)

    name: str
    template: templates.Template
    keys: Sequence[str]
    choices: Sequence[str] = ()
    client: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shuffle_seed: int = 0
    noise_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.template.check([k for k in self.keys if k not in self.choices])
        kw = dict(self.pred_kw)
        self._samples = kw.pop("num_samples", 1)
        self._seed = kw.pop("seed", 0)
        self._settings = dict(max_tokens=kw.pop("max_new_tokens"), temperature=kw.pop("temperature", 0.0))
        if "top_p" in kw:
            self._settings["top_p"] = kw.pop("top_p")
        if kw:
            raise ValueError(f"pred_kw has {sorted(kw)[0]!r}, which servers don't know: leave it out.")

    def _check_vocabulary(self):
        """A server's model has a vocabulary of its own."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides about an answer, besides the model and what it is shown."""
        return self._settings | dict(samples=self._samples, seed=self._seed)

    @functools.cached_property
    def shown(self) -> list[_Shown]:
        """What is known of each row's image; each file is decoded once, however many questions it has."""
        known, out = {}, []
        for i in range(len(self.inputs)):
            content = self.inputs[i]["image"]
            digest = hashlib.sha256(content).digest()
            if digest not in known:
                sent, rgb = pictures.of_row(self.inputs, i)
                size = tuple(map(int, rgb.shape[:2]))
                known[digest] = _Shown(questions.image_key(rgb), size, sent == content, len(sent), digest)
            out.append(known[digest])
        return out

    def sent(self) -> tuple[int, int]:
        """(different images, their bytes) that the model's own pass sends."""
        found = {image.digest: image.bytes for image in self.shown}
        return len(found), sum(found.values())

    def answered(self, params, part, folder) -> list[dict]:
        """See the base class."""
        rows = [self._line(self.inputs[i], image.key) for i, image in enumerate(self.shown)]
        if not rows:
            raise ValueError("there are no questions to evaluate on.")
        self._first = {}
        for i, row in enumerate(rows):
            self._first.setdefault(row["image_key"], i)
        faults, keys = collections.Counter(), set()
        with replies_lib.Cache(self.outdir / REPLIES, "a model's reply") as cache:
            try:
                for who in ("model", *(c for c in self.controls if c not in scoring.TEXT_CONTROLS)):
                    self._pass(who, rows, cache, faults, keys)
            finally:
                costs = dict(model=self.name, faults=dict(faults), **replies_lib.totals(cache, keys))
                files.write_text(self.outdir / COSTS, json.dumps(costs, indent=2) + "\n")
        for who in self.controls:
            if who in scoring.TEXT_CONTROLS:
                self.add_text_control(who, rows)
        return rows

    def _line(self, source, key):
        texts = {k: source[k] for k in self.keys}
        questions.check({}, [texts])
        line = dict(
            question_id=source["question_id"],
            image_id=source.get("image_id"),
            image_key=key,
            question=source["question"],
            prompt="",
            answer=source["answer"],
            answer_type=source["answer_type"],
        )
        more = {k: v for k, v in texts.items() if k not in line and k not in self.choices}
        line |= results_lib.plain(more, f"question {source['question_id']!r}")
        if self.choices:
            line |= questions.choices_of(source, self.choices)
            line["answer"] = line[row_keys.ANSWER_LETTER]  # which is what is asked for
        line["prompt"] = "\n".join(filter(None, self.template.fill(texts | line)))
        return line

    def _pass(self, who, rows, cache, faults, keys):
        """Asks all questions with the images of a control, and adds the answers to the rows."""
        other = {}
        if who == "shuffled_images":
            if len({row["image_key"] for row in rows}) < 2:
                notes.say(controls_lib.ONE_IMAGE, file=sys.stderr)
                return
            other = controls_lib.derangement([row["image_key"] for row in rows], self.shuffle_seed)
        requests, names, seeds = {}, [], {}
        for i, row in enumerate(rows):
            key = other.get(row["image_key"])
            mine = []
            for sample in range(self._samples):
                shown = [row["image_key"], [*self.shown[i].size]]
                shown = {"question_only": [], "blank_image": shown[1:], "noise_image": [*shown, self.noise_seed]}.get(
                    who, [*shown, key]
                )
                asked = [self.name, self.template.digest, self._text(row), who, shown, self._settings]
                name = results_lib.digest([[*asked, self._seed, sample]])
                requests[name] = functools.partial(self._messages, who, i, row, key)
                seeds[name] = int(name[:8], 16) >> 1
                mine.append(name)
            names.append(mine)
        keys |= set(requests)
        without_image = who == scoring.QUESTION_ONLY
        with self.progress(f"asking {self.name}, {who}", len(requests)) as progress:
            progress.update(sum(cache.score(name) is not None for name in requests))
            sampled = self._samples > 1 or self._settings["temperature"]
            try:
                left, found = judge_client.ask_all(
                    requests,
                    lambda key, record: 1,  # whatever it says, an empty text too, is its answer
                    cache,
                    model=self.name,
                    settings=self._settings,
                    settings_of=(lambda key, attempt: {"seed": seeds[key]}) if sampled else None,
                    progress=lambda total: progress.update(),
                    kept_characters=None,
                    **(dict(max_faults=_FAULTS_WITHOUT_IMAGE) if without_image else {}) | self.client,
                )
            except ServerError as e:
                raise (ServerError(f"{str(e).rstrip('.')}. {self._advice()}") if without_image else e) from None
        faults.update(found)
        if left:
            raise ServerError(
                f"{len(left)} of {len(requests)} questions ({who}) have no answer, such as: "
                f"{next(iter(left.values())).rstrip('.')}. The same command asks only these again."
                + (f" {self._advice()}" if without_image else "")
            )
        for row, mine in zip(rows, names):
            self._add(who, row, [cache.replies(name)[0] for name in mine], other)

    def _add(self, who, row, records, other):
        prefix = "" if who == "model" else f"{who}_"
        row[f"{prefix}predictions"] = [record["reply"].strip() for record in records]
        if who == "model":
            row["unfinished"] = sum(record["finish"] == "length" for record in records)
        if other:
            row[f"{who}_image_id"] = self.inputs[self._first[other[row["image_key"]]]].get("image_id")
        row |= scoring.correct(row[f"{prefix}predictions"][0], scoring.truths(row), prefix)

    def _advice(self):
        others = ",".join(c for c in self.controls if c != scoring.QUESTION_ONLY)
        return f"If the model takes no question without an image, --controls={others} leaves that out."

    def _text(self, row):
        return list(self.template.fill(row))

    def _messages(self, who, index, row, key, attempt):
        system, user = self._text(row)
        content = [{"type": "text", "text": user}]
        if who != "question_only":
            image = {"type": "image_url", "image_url": {"url": pictures.data_url(self._image(who, index, row, key))}}
            content.insert(0 if self.template.image == "before" else 1, image)
        start = [{"role": "system", "content": system}] if system else []
        return [*start, {"role": "user", "content": content}]

    def _image(self, who, index, row, key) -> bytes:
        size = self.shown[index].size
        if who == "blank_image":
            return pictures.blank(size)
        if who == "noise_image":
            return pictures.noise(size, row["image_key"], self.noise_seed)
        if who == "shuffled_images":
            return pictures.resized(pictures.of_row(self.inputs, self._first[key])[1], size)
        plain = self.shown[index].plain
        return self.inputs[index]["image"] if plain else pictures.of_row(self.inputs, index)[0]
