"""Figures from answers: what counts as right, text metrics, intervals. Knows no models."""
