"""Configs of the filter: which rules, with which settings."""
