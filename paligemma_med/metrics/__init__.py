"""Figures from answers: what counts as right, text metrics, intervals. Needs no model."""
