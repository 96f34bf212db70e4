"""Data sets as TFDS folders: one builder package a data set, built by `python -m data_prep.build`.

Nothing here imports `paligemma_med`, TensorFlow or PyTorch, and nothing is downloaded: the user
points at the released files (or lets `phantom` draw its own) and gets `array_record` files.
"""
