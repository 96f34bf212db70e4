"""A table of questions and a folder of images → answers.csv.

`python -m paligemma_med.ask --help` shows the options; docs/own_data.md takes one from a table to an adapter.
"""

from paligemma_med.ask.answering import Answer, Answerer, Question
from paligemma_med.ask.sheet import Sheet
from paligemma_med.ask.table import ask_table, questions_of

__all__ = ["Answer", "Answerer", "Question", "Sheet", "ask_table", "questions_of"]
