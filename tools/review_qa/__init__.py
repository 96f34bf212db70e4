"""Has people look at a sample of question-answer pairs; see docs/synthesis.md."""
