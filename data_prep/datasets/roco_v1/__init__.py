"""ROCO v1: radiological images of open-access articles with captions."""
