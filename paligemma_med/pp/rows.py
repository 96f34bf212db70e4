"""The keys of a row: one question about one image, from the data set to predictions.jsonl.

Builders store them, pp strings keep them, evaluators score and copy them, tools show them. A data set
may have more; the keys that two packages must agree about are named here.
"""

# Text that every set has besides the encoded "image". question_id is unique within a split; questions
# about one image share their image_id; answer_type is "OPEN" or "CLOSED".
KEYS = ("question_id", "image_id", "question", "answer", "answer_type")

# Those that are needed to ask and score a question.
NEEDED = ("question_id", "question", "answer", "answer_type")

# Results are broken down by these, where a set has them.
GROUPS = ("answer_type", "content_type", "modality", "location", "location_category")

# Multiple choice: letters, keys of the choices' texts in the order of their letters, and the key of
# the answer's letter.
LETTERS = "ABCD"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
ANSWER_LETTER = "answer_letter"

# Where more than one answer counts as right: all of them, a line each, in a text of this key; else `answer` alone.
ACCEPTED = "accepted_answers"


def choices_there(row, keys, least=0) -> list[str]:
    """The texts of a row's choices, without empty ones at the end: questions of one set may have two, three or four.

    `least` is the number of one that is named, such as the answer's, and stays.
    """
    texts = [row[k] for k in keys]
    while len(texts) > max(2, least + 1) and not texts[-1]:
        texts.pop()
    return texts
