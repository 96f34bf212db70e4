"""Questions asked one after another about images in memory: the half of `explain --serve` that knows the model.

A `Desk` holds the last images, answers and pages, so many and no more, and lets one question at a time to the model.
Every question has the same programs (`explain(fixed=True)`), which `warm_up` compiles. `serve` speaks HTTP in front of
it.

Earlier turns. In a prefix language model with PaliGemma's prompt (BOS, question, line break, all read in both
directions, the image in front) a history is put as `evaluators.dialogue` measures it: each earlier question, its line
break, the answer, a line break. Other systems' templates for several turns aren't written down here, so their questions
stand alone, and the page says so.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import threading

import numpy as np

from paligemma_med import page as pages
from paligemma_med.explain import page
from paligemma_med.explain.answer import Loaded, explain, greedy, pictures, piece
from paligemma_med.files import named, whole_file
from paligemma_med.metrics.answers import without_thought
from paligemma_med.parallel import notes
from paligemma_med.pp import dicom, image_cells, ops_image
from paligemma_med.pp import images as images_lib

MAX_IMAGES, MAX_ANSWERS = 8, 16  # kept in memory; the oldest go
MAX_TURNS = 20  # of an image
MAX_QUESTION = 2000  # characters
MAX_WAITING = 8  # questions that wait for the model
SEPARATOR = "\n"
LOG = "answers.jsonl"  # of --keep


class Busy(Exception):
    """So many questions wait already."""


class Gone(ValueError):
    """An image, an answer or a page that isn't kept any more."""


@dataclasses.dataclass
class _Image:
    name: str
    pixels: np.ndarray  # uint8[H, W, 3]
    sha256: str
    turns: list  # (question, answer, its tokens as a part of later prompts)


@dataclasses.dataclass
class _Asked:
    image: _Image
    question: str
    row: dict  # preprocessed, earlier turns included
    number: int
    html: str | None = None


class Desk:
    """See this file's docstring. Its methods may be called from several threads.

    Args:
      loaded: `explain.load`.
      keep: folder for pages and answers, which must exist; None keeps nothing on disk.
      **kw: of `explain`, for all questions.
    """

    def __init__(self, loaded: Loaded, *, keep=None, max_new_tokens=64, **kw):
        self.loaded, self.keep, self.max_new_tokens, self.kw = loaded, keep, max_new_tokens, kw
        self.window = ops_image.window_of(loaded.pp.pp)  # of DICOM files in which none is chosen; None: their own
        self.doing = ""  # what the model is at, in words
        self._images, self._asked = collections.OrderedDict(), collections.OrderedDict()
        self._count = _lines(keep) if keep else 0
        self._store, self._model, self._reader = threading.Lock(), threading.Lock(), threading.Lock()
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._next = 0

    def warm_up(self) -> None:
        """Compiles all programs, on a grey image. Also finds out whether the system has turns (`has_turns`)."""
        grey = np.full((64, 64, 3), 127, np.uint8)
        row = self.loaded.pp({"image": grey, "question": "Is this an image?"})
        self.has_turns = _has_turns(self.loaded, row)
        greedy(self.loaded, row, list(pictures(self.loaded, row).values()), self.max_new_tokens, fixed=True)
        self._report(grey, "Is this an image?", row, "warm-up")

    # --- Images ---

    def add_image(self, content: bytes, name: str, show: str = "") -> dict:
        """Decodes and keeps an image: dict(id, name, width, height, frames, has_windows, notes, picture) for the page.

        Args:
          content: of a file.
          name: the file's.
          show: what to show of it, as cells of tables say it: "frame=5|window=lung".

        Raises:
          ValueError: bytes that are no image, too large a one, a frame or a window that there isn't.
        """
        name = pages.clean(name)[:200]
        try:
            choice = image_cells.parse_choice(show, ("frame", "window"))
            if len(show) > 100 or not (choice.frame or "1").isdigit():
                raise images_lib.ImageError(f"{show:.100}: expected one frame and one window")
            with self._reader:  # one at a time: decoding takes several times the pixels' memory
                frame, window = int(choice.frame or 1) - 1, choice.window or self.window
                found = images_lib.decode(content, frame=frame, window=window)
                frames, has_windows = images_lib.frames(content), dicom.is_dicom(content)
        except images_lib.ImageError as e:
            raise ValueError(f"the file {name}: {e}") from None
        name += f"#{show}" if show else ""
        image = _Image(name, found.rgb, hashlib.sha256(content).hexdigest(), [])
        height, width = found.rgb.shape[:2]
        return dict(
            id=self._keep_in(self._images, image, MAX_IMAGES),
            name=image.name,
            width=width,
            height=height,
            frames=frames,
            has_windows=has_windows,
            notes=[note[:1].upper() + note[1:] for note in found.notes],
            picture=page.data_url(found.rgb),
        )

    def _keep_in(self, store, value, limit):
        with self._store:
            self._next += 1
            key = str(self._next)
            store[key] = value
            while len(store) > limit:
                store.popitem(last=False)
        return key

    def _get(self, store, key, what):
        with self._store:
            if not isinstance(key, str) or key not in store:
                raise Gone(f"This {what} is no longer kept: {'open it' if what == 'image' else 'ask'} again.")
            store.move_to_end(key)
            return store[key]

    # --- Questions ---

    def ask(self, image_id: str, question: str, history: bool = False) -> dict:
        """The most probable answer, on the image and without it: a dict for the page.

        Args:
          image_id: of `add_image`.
          question: text.
          history: whether the prompt has the image's earlier questions and their answers in front, the oldest left out
            where they don't fit.

        Raises:
          Gone, Busy, ValueError: an image that isn't kept, too many questions at once, a question that can't be asked.
        """
        if not isinstance(question, str) or not question.strip():
            raise ValueError("The question is empty.")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"The question has {len(question):,} characters; expected at most {MAX_QUESTION:,}.")
        image = self._get(self._images, image_id, "image")
        question = pages.clean(question.strip())
        row = self.loaded.pp({"image": image.pixels, "question": question})
        own = _prompt(row)
        with self._use("answering"):
            before = list(image.turns) if history and self.has_turns else []
            row, used = _with_history(row, [tokens for *_, tokens in before])
            on_image, on_blank, _ = greedy(
                self.loaded, row, list(pictures(self.loaded, row).values()), self.max_new_tokens, fixed=True
            )
            if self.has_turns:
                to_int = self.loaded.tokenizer.to_int
                said = to_int(without_thought(on_image.text)) + to_int(SEPARATOR)
                image.turns.append((question, on_image.text, np.concatenate([own[1:], np.asarray(said, np.int32)])))
                del image.turns[:-MAX_TURNS]
            self._count += 1
            asked = _Asked(image, question, row, self._count)
            self._log(asked, on_image, on_blank, used)
        tokenizer = self.loaded.tokenizer
        return pages.clean(
            dict(
                id=self._keep_in(self._asked, asked, MAX_ANSWERS),
                question=question,
                image=image.name,
                answer=pages.shown(on_image.text),
                probability=page.percent(on_image.logprobs.sum()),
                tokens=[[piece(tokenizer, t), page.percent(p)] for t, p in zip(on_image.tokens, on_image.logprobs)],
                ended=int(on_image.tokens[-1]) in tokenizer.stop_tokens,
                blank=pages.shown(on_blank.text),
                blank_probability=page.percent(on_blank.logprobs.sum()),
                same=on_blank.text.strip().lower() == on_image.text.strip().lower(),
                turns_read=used,
                turns_left_out=len(before) - used,
                tokens_cut=int(row.get("_truncated", 0)),
            )
        )

    def report(self, asked_id: str) -> None:
        """Makes the saliency page of an answer, for `html`. Raises as `ask`."""
        asked = self._get(self._asked, asked_id, "answer")
        if asked.html is None:
            with self._use("measuring what the answer rests on"):
                made = self._report(asked.image.pixels, asked.question, asked.row, asked.image.name)
                asked.html = page.render(made)
            if self.keep:
                with whole_file(os.path.join(self.keep, f"{asked.number:04d}.html")) as f:
                    f.write(asked.html.encode())

    def html(self, asked_id: str) -> str:
        """The page that `report` made."""
        asked = self._get(self._asked, asked_id, "page")
        if asked.html is None:
            raise Gone("This page isn't made yet.")
        return asked.html

    def _report(self, pixels, question, row, title):
        loaded = self.loaded._replace(pp=lambda _: dict(row))
        kw = dict(self.kw, max_new_tokens=self.max_new_tokens)
        return explain(loaded, pixels, question, title=title, fixed=True, stage=self._stage, **kw)[0]

    @contextlib.contextmanager
    def _use(self, doing):
        """The model, for one thread at a time."""
        if not self._waiting.acquire(blocking=False):
            raise Busy("Too many questions are waiting: try again in a while.")
        try:
            with self._model:
                self.doing = doing
                try:
                    yield
                finally:
                    self.doing = ""
        finally:
            self._waiting.release()

    @contextlib.contextmanager
    def _stage(self, doing):
        with notes.stage(doing) as tell:
            # Nothing is compiled after the start, whatever the stage's words for a first report.
            self.doing = words = doing.replace("compiling the programs, and ", "").replace("compiling ", "")

            def progress(done, total):
                self.doing = f"{words}: {done} of {total}"
                tell(done, total)

            yield progress

    def _log(self, asked, on_image, on_blank, used):
        if not self.keep:
            return
        line = dict(
            number=asked.number,
            image=asked.image.name,
            sha256=asked.image.sha256,
            question=asked.question,
            answer=on_image.text,
            logprob=float(on_image.logprobs.sum()),
            blank_answer=on_blank.text,
            turns_read=used,
            weights=self.loaded.weights,
        )
        path = os.path.join(self.keep, LOG)
        with named(path), open(path, "ab") as f:
            f.write(json.dumps(line).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())


def _lines(folder):
    try:
        with open(os.path.join(folder, LOG), "rb") as f:
            return sum(1 for _ in f)
    except FileNotFoundError:
        return 0


# --- Earlier turns ---


def _prompt(row):
    """int32[n]: a preprocessed row's prompt, without padding."""
    return np.asarray(row["text"], np.int32)[np.asarray(row["mask_input"]) > 0]


def _has_turns(loaded, row):
    """Whether the prompt is of the kind that this file's docstring names."""
    prompt, end = _prompt(row), loaded.tokenizer.to_int(SEPARATOR)
    causal = np.asarray(row["mask_ar"])[: len(prompt)].any()
    return (
        loaded.model.image_ar == "prefix"
        and row.get("image_at") is None
        and not causal
        and len(prompt) > len(end)
        and prompt[0] == loaded.tokenizer.bos_token
        and prompt[-len(end) :].tolist() == end
    )


def _with_history(row, turns):
    """(the row with earlier turns, int32[…] each, after its BOS; how many of them fit, the last ones)."""
    own, limit = _prompt(row), len(row["text"])
    turns = list(turns)
    while turns and len(own) + sum(map(len, turns)) > limit:
        turns.pop(0)
    if not turns:
        return row, 0
    prompt = np.concatenate([own[:1], *turns, own[1:]])
    out = {k: np.array(row[k]) for k in ("text", "mask_ar", "mask_input")}
    for key, inside, outside in (("text", prompt, 0), ("mask_ar", 0, 1), ("mask_input", 1, 0)):
        out[key][:] = outside
        out[key][: len(prompt)] = inside
    return {**row, **out}, len(turns)
