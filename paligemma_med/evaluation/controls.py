"""What a model's figures are measured against: answers that need no image, and other images.

  majority          the most frequent answer to the same question in the training split: what can
                    be known from the question alone.
  majority_type     the most frequent answer to any question of the same answer type there.
  echo              the question itself. Metrics that count common words reward it; published
                    figures have been no better.
  shuffled_images   the same model and prompts, each question with another question's image. A
                    model that scores the same here doesn't look.
  blank_image       the same, all images mid-grey.
  noise_image       the same, all images noise.

The first three cost nothing, each of the others a pass. Their names are in `scoring`.
"""

import collections
import hashlib
import pathlib
import re

import numpy as np

# --- Without a model ---


def majority_answers(rows):
    """The most frequent answers in training rows, for `majority_answer` and `majority_of_type`.

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
    return question or majority_of_type(majority, row)


def majority_of_type(majority, row):
    """The most frequent answer to questions of this type; "" for a type that training lacks."""
    return majority.get(("answer_type", row["answer_type"].strip()), "")


def _natural(text):
    """A key that sorts "q2" before "q10"."""
    return [int(t) if i % 2 else t for i, t in enumerate(re.split(r"(\d+)", text))]


# --- Other images ---


def image_key(pixels):
    """A digest of an image as the model sees it: 16 hexadecimal digits. Pictures are told apart by
    it, since one picture can have two ids."""
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:16]


def blank_image(shape):
    """float32[shape] of mid-grey: 0 on the scale of [-1, 1]."""
    return np.zeros(shape, np.float32)


def noise_image(shape, key, seed=0):
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

    def add(self, pixels, key, row):
        """Keeps float[height, width, 3] unless an image of this key is there."""
        if key not in self.image_id:
            if "image_id" not in row:
                raise ValueError(
                    f"question {row['question_id']!r} has no 'image_id', which shuffling the "
                    "images needs; add it to the keep(...) of pp_fn."
                )
            np.save(self._folder / f"{key}.npy", pixels)
            self.image_id[key] = row["image_id"]

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
