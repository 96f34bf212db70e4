"""The keys of a row: one question about one image, from the data set to predictions.jsonl.

Builders store them, pp strings keep them, evaluators score and copy them, tools show them. A set has
its own besides, but what two rooms must agree about is named here.
"""

# Text that every set has, beside the encoded "image". question_id is unique within a split; questions
# about one image share their image_id; answer_type is "OPEN" or "CLOSED".
KEYS = ("question_id", "image_id", "question", "answer", "answer_type")

# Those of them without which a question can't be asked and scored.
NEEDED = ("question_id", "question", "answer", "answer_type")

# What results are broken down by, where a set has it.
GROUPS = ("answer_type", "content_type", "modality", "location", "location_category")

# Multiple choice: letters, keys of the choices' texts in the order of their letters, and the key of
# the answer's letter.
LETTERS = "ABCD"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
ANSWER_LETTER = "answer_letter"
