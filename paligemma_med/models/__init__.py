"""The model: Flax modules and nothing else (no files, no training, no decoding loop)."""
