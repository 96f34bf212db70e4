"""Configs of the filter of generated pairs."""
