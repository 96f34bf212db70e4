"""Drawn pictures of simple shapes with questions: what the tiny base learns before radiology."""
