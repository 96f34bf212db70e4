"""Data sets as TFDS folders: one builder package per data set, built by `python -m data_prep.build`.

Nothing here imports TensorFlow, PyTorch or anything of `paligemma_med` except `paligemma_med.pp`, and
nothing is downloaded: the user points at the released files (or lets `phantom` draw its own) and gets
`array_record` files.
"""
