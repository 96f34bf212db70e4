"""Configs: their keys and values, durations, and the file they are saved in."""
