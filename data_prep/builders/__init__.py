"""TFDS builders that the data sets have in common, and what keeps their memory flat."""
