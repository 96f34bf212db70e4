"""Layers that image towers and language models share."""
