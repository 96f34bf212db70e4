"""Manual review of a sample of question-answer pairs; see docs/synthesis.md."""
