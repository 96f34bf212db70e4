"""Turns image captions into question-answer pairs with a language model; see docs/synthesis.md."""
