"""The data sets' common TFDS builders, and what keeps their memory use flat."""
