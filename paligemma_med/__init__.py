"""PaliGemma for radiological visual question answering, in JAX on big_vision's contract.

This file stays empty of imports, so that `import paligemma_med` costs nothing: each part is
imported where it is used (`paligemma_med.models`, `.pp`, `.checkpoints`, `.decode`, ...).
"""

__version__ = "0.1.0.dev0"
