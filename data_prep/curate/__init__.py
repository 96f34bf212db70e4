"""Filtering and weighting of question-answer rows: the paper's section 4.3 and Figure 4."""
