"""Drawn radiology-like images with findings, and questions that need the image to be answered."""
