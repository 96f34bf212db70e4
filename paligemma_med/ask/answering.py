"""Answers to many questions about many images: batches that fit the memory, each image seen once.

The image tower is most of what a question costs (at 448 px more than nine tenths of what is computed before the first
token), so its tokens are kept for the next question on the same picture. What is the same picture is told by the
file's bytes. While the devices answer a batch, the next one is read and preprocessed.
"""

import collections
import concurrent.futures
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from paligemma_med import cli, decode, weights
from paligemma_med.input_pipeline import devices
from paligemma_med.models import lean
from paligemma_med.parallel import distributed, sharding
from paligemma_med.pp import get_preprocess_fn, registry

BATCH, SLOW_BATCH = 32, 4  # questions; the latter with large weights on a CPU, which gain nothing from more
ENCODED = 8  # images in a pass of the tower
KEPT = 2**29  # bytes of image tokens, on the host
# Ops that make of an image another one, and read nothing else.
_OF_IMAGES = ("window", "decode", "resize", "value_range")
# What a prompt must not be made of, even if its template says so.
_TRUTH = ("answer", "suffix", "answer_letter")


class Question(NamedTuple):
    """One row to be asked.

    Attributes:
      texts: {column: text}, `question` among them.
      image: gives the image's bytes; a ValueError or OSError becomes the row's error.
      number: identifies the row for the random numbers of samples.
    """

    texts: Mapping[str, Any]
    image: Callable[[], bytes]
    number: int


class Answer(NamedTuple):
    """What became of a question: `text` and `logprob`, the sum over the answer's tokens, or an `error`.

    Attributes:
      note: what is to be known about the answer, such as that it was cut off; or "".
    """

    text: str = ""
    logprob: float | None = None
    note: str = ""
    error: str = ""


class _Prepared(NamedTuple):
    """A question as the model reads it: `row` of the pp, or an `error`; `key` of its image."""

    question: Question
    row: dict | None = None
    key: str = ""
    error: str = ""


class Answerer:
    """A model with its weights, ready to be asked.

    Attributes:
      config: ConfigDict it was made from.
      params: the nested tree of its weights, on the devices.
      encoded: how many images went through the tower so far.
      batch_size: of the next batch; halved when memory doesn't suffice.
    """

    def __init__(self, config, checkpoint, *, batch_size=0, **decoding):
        """
        Args:
          config: ConfigDict of an experiment, for its prompt and model; not changed.
          checkpoint: anything `checkpoints.load_params` takes.
          batch_size: questions at a time, rounded to what the devices divide; 0: `BATCH`, or `SLOW_BATCH`.
          **decoding: for `decode.generate`, but num_samples; max_new_tokens is 64 by default.

        Raises:
          ValueError: the config has no prompt; the weights don't fit it.
        """
        if not config.get("predict_pp"):
            raise ValueError("config has no predict_pp, which makes a prompt of a question.")
        self._of_image, self._of_text = (get_preprocess_fn(pp) for pp in split_pp(config.predict_pp))
        self._model, self._tok, self._mesh, self.params = weights.load(config, checkpoint)
        self.config, self._decoding = config, {"max_new_tokens": 64, **decoding}
        self._shards = devices.shards(self._mesh)
        self._sharding = devices.batch_sharding(self._mesh)
        self.batch_size = self._divisible(batch_size or (SLOW_BATCH if _is_slow(self.params) else BATCH))
        self._kept, self._kept_bytes, self.encoded = collections.OrderedDict(), 0, 0

    def answers(self, questions: Iterable[Question], total: int) -> Iterator[list[tuple[Question, Answer]]]:
        """Asks all, and gives the answers batch by batch, in the order of the questions.

        Args:
          total: how many there are, at most; no batch is larger than it has to be.

        Raises:
          RuntimeError: the memory doesn't suffice for one question.
        """
        self.batch_size = min(self.batch_size, self._divisible(total + self._shards - 1))
        with (
            concurrent.futures.ThreadPoolExecutor(1) as ahead,
            concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers,
        ):
            chunks = _chunks(questions, lambda: self.batch_size)
            following = ahead.submit(self._prepared, next(chunks, []), readers)
            while prepared := following.result():
                following = ahead.submit(self._prepared, next(chunks, []), readers)
                yield from self._in_parts(prepared)

    def _in_parts(self, prepared):
        """The answers to a chunk, in smaller parts once it has turned out too large."""
        while prepared:
            part = prepared[: self.batch_size]
            try:
                found = self._answered(part)
            except Exception as e:
                if not cli.is_out_of_memory(e) or self.batch_size <= self._shards:
                    raise
                self.batch_size = self._divisible(self.batch_size // 2)
                continue
            yield found
            prepared = prepared[len(part) :]

    def _divisible(self, size):
        return max(size // self._shards, 1) * self._shards

    # --- On the host ---

    def _prepared(self, questions, readers):
        """`_Prepared` of each question; images are read by several threads, each once."""
        return list(self._with_texts(questions, readers.map(lambda q: _content(q.image), questions), readers))

    def _with_texts(self, questions, contents, readers):
        contents = list(contents)
        keys = [x if isinstance(x, Exception) else hashlib.sha256(x).hexdigest() for x in contents]
        first = {key: content for key, content in zip(keys, contents) if isinstance(key, str)}
        seen = dict(zip(first, readers.map(self._seen, first.values())))
        for question, key in zip(questions, keys):
            image = seen[key] if isinstance(key, str) else key
            if not isinstance(image, Exception):
                texts = {k: v for k, v in question.texts.items() if k not in _TRUTH}
                try:
                    yield _Prepared(question, self._of_text({**texts, **image}), key)
                    continue
                except ValueError as e:
                    image = e
            yield _Prepared(question, error=_told(image))

    def _seen(self, content):
        """What the pp makes of an image alone, or the error."""
        try:
            return self._of_image({"image": content})
        except (ValueError, OSError) as e:
            return e

    # --- On the devices ---

    def _answered(self, part):
        """[(question, answer)] of one batch."""
        asked = [i for i, x in enumerate(part) if x.row is not None]
        out = [(x.question, Answer(error=x.error)) for x in part]
        if not asked:
            return out
        tokens = self._tokens_of({part[i].key: part[i].row["image"] for i in asked})
        # Filled up with the first one, so that all batches share a program.
        rows = [part[i] for i in asked + asked[:1] * (self.batch_size - len(asked))]
        batch = {k: v for k, v in decode.batch_of([x.row for x in rows]).items() if k != "image"}
        batch["zimg"] = np.stack([tokens[x.key] for x in rows])
        batch["row_id"] = np.array([x.question.number for x in rows], np.uint32)
        batch["_mask"] = np.arange(len(rows)) < len(asked)
        with sharding.rules(self.config, self._mesh):
            found = decode.generate(
                self._model,
                self.params,
                devices.put(batch, self._sharding, len(rows)),
                eos_token=self._tok.stop_tokens,
                **self._decoding,
            )
        for i, ids, logprobs in zip(asked, *(x[:, 0] for x in distributed.to_host(found))):
            out[i] = (part[i].question, self._answer(part[i].row, ids, logprobs))
        return out

    def _answer(self, row, ids, logprobs):
        notes = []
        if cut := int(row.get("_truncated", 0)):
            notes.append(f"the prompt lost its last {cut} tokens")
        if not np.isin(ids, self._tok.stop_tokens).any():
            notes.append(f"cut off after {len(ids)} tokens")
        return Answer(self._tok.to_str(ids.tolist()), float(np.sum(logprobs)), "; ".join(notes))

    def _tokens_of(self, images):
        """{key: image tokens [Q, D]} of {key: pixels}, from the tower or from before."""
        out = {}
        for key in images:
            if key in self._kept:
                self._kept.move_to_end(key)
                out[key] = self._kept[key]
        new = [key for key in images if key not in out]
        size = min(self._divisible(max(ENCODED, self._shards)), self.batch_size)
        while new:
            # Two programs: for a few images the tower goes over each by itself. Cut over devices there is but one.
            count = size if len(new) >= size or self._shards > 1 else 1
            keys, new = new[:count], new[count:]
            pixels = np.stack([np.asarray(images[key]) for key in keys + keys[:1] * (count - len(keys))])
            with sharding.rules(self.config, self._mesh):
                placed = devices.put({"image": pixels}, self._sharding, count)["image"]
                found = distributed.to_host(decode.encode_images(self._model, self.params, placed))
            for key, tokens in zip(keys, found):
                out[key] = tokens.copy()  # or a view would keep the others
                self._keep(key, out[key])
            self.encoded += len(keys)
        return out

    def _keep(self, key, tokens):
        self._kept[key] = tokens
        self._kept_bytes += tokens.nbytes
        while self._kept_bytes > KEPT and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes


def _is_slow(params):
    return jax.default_backend() == "cpu" and sum(x.nbytes for x in jax.tree.leaves(params)) > lean.LARGE


def split_pp(pp) -> tuple[str, str]:
    """A pp string in two: what it makes of the image alone, once a picture, and what is left for each question."""
    sections = registry.split(pp)
    count = 0
    for name, _, given in map(registry.parse_call, sections):
        if name not in _OF_IMAGES or {"key", "inkey", "outkey"} & {*given}:
            break
        count += 1
    return "|".join(sections[:count]), "|".join(sections[count:])


def _chunks(questions, size):
    """Lists of questions, each as long as `size()` says when it is begun."""
    chunk, wanted = [], size()
    for question in questions:
        chunk.append(question)
        if len(chunk) >= wanted:
            yield chunk
            chunk, wanted = [], size()
    if chunk:
        yield chunk


def _content(read):
    try:
        return read()
    except (ValueError, OSError) as e:
        return e


def _told(error):
    """One line on an error; a file's name is in the row already."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    said = re.sub(r"^pp op '.*?': ", "", said)
    return " ".join(said.split()) or type(error).__name__
