"""Hugging Face directories of weights, read and written without PyTorch.

`families` lists the models, each with a module of names and configs (`paligemma`, made of `siglip` and `gemma`);
`layout`, `config` and `tensors` are what these share; `read` and `write` are the same for all.
"""

from paligemma_med.checkpoints.hf.read import check_agrees, model_config, open_hf
from paligemma_med.checkpoints.hf.write import save_hf

__all__ = ["check_agrees", "model_config", "open_hf", "save_hf"]
