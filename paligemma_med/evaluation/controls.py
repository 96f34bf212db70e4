"""What a model's figures are measured against: answers that need no image, and other images.

  majority          the most frequent answer to the same question in the training split: what can
                    be known from the question alone.
  majority_type     the most frequent answer to any question of the same answer type there.
  mean_box          of answers with boxes: the mean of all boxes in the answers to the same question there.
  echo              the question itself. Metrics that count common words reward it; published
                    figures have been no better.
  shuffled_images   the same model and prompts, each question with another question's image. A
                    model that scores the same here doesn't look.
  blank_image       the same, all images mid-grey.
  noise_image       the same, all images noise.
  question_only     the same without any image; only a model behind a server is asked so (`served`).

The first four cost nothing; each of the others costs a pass over the split. Their names are in
`scoring`.
"""

import collections
import pathlib

import numpy as np

from paligemma_med.evaluation import questions
from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import rows as row_keys

ONE_IMAGE = "All questions are about one image: there is no control with shuffled images."

# --- Without a model ---


class TrainingRows:
    """The texts of a training split, row by row and as often as wanted, for the majority controls.

    To the evaluators the right answer is "answer", whatever its key in the data.
    """

    def __init__(self, read, keys, *, answer="answer", name="train_data"):
        """Takes a split that is open.

        Args:
          read: function of keys that gives a dict of these for each row.
          keys: those that the split has.
          answer: the key of the right answer.
          name: what to call the split in errors.

        Raises:
          ValueError: a key is missing.
        """
        self._read, self._answer = read, answer
        self._keys = (answer, *(k for k in row_keys.NEEDED if k != "answer"))
        for key in self._keys:
            if key not in keys:
                what = f"train_answer={answer!r}" if key == answer else "train_data"
                raise ValueError(f"{what}: {name} has no {key!r}, only {sorted(keys)}")

    def __iter__(self):
        for row in self._read(self._keys):
            yield {**row, "answer": row[self._answer]}


def majority_answers(rows) -> dict[tuple[str, str], str]:
    """The most frequent answers in training rows, for `majority_answer` and `majority_of_type`.

    Args:
      rows: dicts with question, answer, answer_type and question_id; what else they have is let go.

    Returns:
      {("question", question): answer, ("answer_type", type): answer}. Questions are the same if
      their strings are, but for blanks around them. Answers are counted as they are written, but for
      blanks around them. Of equally frequent ones, the first by question_id wins (numbers in it
      compared as numbers), so that the result doesn't depend on the order of rows on disk.

    Raises:
      ValueError: a row without one of these keys.
    """
    texts = []
    for row in rows:
        if missing := [k for k in row_keys.NEEDED if k not in row]:
            raise ValueError(f"a row of train_data has no {missing[0]!r}, found {sorted(row)}.")
        texts.append({k: row[k] for k in row_keys.NEEDED})
    counts = collections.defaultdict(collections.Counter)
    for row in sorted(texts, key=lambda row: questions.natural_key(str(row["question_id"]))):
        for key in ("question", "answer_type"):
            counts[key, row[key].strip()][row["answer"].strip()] += 1
    # most_common keeps the order of insertion among equals.
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}


def majority_answer(majority, row) -> str:
    """The answer of `majority_answers` to this question; to one that training doesn't have, that of
    its answer type; "" where there is neither."""
    question = majority.get(("question", row["question"].strip()))
    return question or majority_of_type(majority, row)


def majority_of_type(majority, row) -> str:
    """The most frequent answer to questions of this type; "" for a type that training lacks."""
    return majority.get(("answer_type", row["answer_type"].strip()), "")


def mean_boxes(rows) -> dict[str, str]:
    """{question: an answer with one box, the mean of all in the answers of training to it}, for `mean_box`.

    Its name, or the words before it, is the most frequent one there. Under "" stands the mean box of all of training,
    without name and words.

    Args:
      rows: dicts with question and answer; answers without boxes are let go.

    Raises:
      ValueError: no answer has a box.
    """
    found = collections.defaultdict(lambda: ([], collections.Counter(), collections.Counter()))
    for row in rows:
        said = boxes_lib.read(row["answer"])
        for question in (row["question"].strip(), "") if said.boxes else ():
            boxes, names, words = found[question]
            boxes += said.boxes
            names.update(sorted(said.labels))
            words[said.answer] += 1
    if not found:
        raise ValueError("no answer of train_data has a box, which the control mean_box needs.")
    out = {}
    for question, (boxes, names, words) in found.items():
        name, said = (counter.most_common(1)[0][0] if question else "" for counter in (names, words))
        out[question] = boxes_lib.to_text([np.mean(boxes, axis=0)], [] if said or not name else [name], said)
    return out


def mean_box(means, row) -> str:
    """The answer of `mean_boxes` to a question; to one that training doesn't have, its mean of all boxes, with the name
    that was asked for."""
    question = row["question"].strip()
    if question in means:
        return means[question]
    name = question.removeprefix("detect ") if question.startswith("detect ") else ""
    return f"{means['']} {name}" if name else means[""]


# --- Other images ---


def noise_image(shape, key, seed=0) -> np.ndarray:
    """float32[shape] in [-1, 1), each number drawn for itself, by the image's key and `seed` alone:
    questions on one image share their noise, in any order and batch."""
    rng = np.random.default_rng([seed, int(key, 16)])
    return rng.random(shape, np.float32) * 2 - 1


class Images:
    """The different images of a split, kept in files between the two passes of shuffled_images.

    On disk because 2,000 of 448 px would be 4.8 GB; exact, because a control that differs by
    rounding would be a different experiment. Should one picture have two ids, no question gets its
    own back under the other.
    """

    def __init__(self, folder):
        self.image_id = {}  # key → id of the first row that had it
        self._folder = pathlib.Path(folder)

    def add(self, pixels, key, row) -> None:
        """Keeps float[height, width, 3] unless an image of this key is there."""
        if key not in self.image_id:
            if "image_id" not in row:
                raise ValueError(
                    f"question {row['question_id']!r} has no 'image_id', which shuffling the "
                    "images needs; add it to the keep(...) of pp_fn."
                )
            np.save(self._folder / f"{key}.npy", pixels)
            self.image_id[key] = row["image_id"]

    def load(self, key) -> np.ndarray:
        return np.load(self._folder / f"{key}.npy")

    def derangement(self, seed) -> dict[str, str]:
        """{key: key of the image to show instead}: each gets the next on a random ring, so that
        every image is used once and none stays in its place."""
        return derangement(self.image_id, seed)


def derangement(keys, seed) -> dict[str, str]:
    """See `Images.derangement`; ValueError for fewer than two keys."""
    keys = sorted(set(keys))
    if len(keys) < 2:
        raise ValueError("shuffling images between questions needs two different images.")
    ring = np.random.default_rng(seed).permutation(len(keys))
    return {keys[a]: keys[b] for a, b in zip(ring, np.roll(ring, 1))}
