"""Evaluators: one file a metric family. A config names one by its file: dict(type="vqa", …)."""
