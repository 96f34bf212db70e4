"""Evaluators: what `type` in config.evals may name, and nothing else.

A file here is one evaluator: dict(type="vqa", …) means `vqa.Evaluator`. What they share is in
`paligemma_med.evaluation`.
"""
