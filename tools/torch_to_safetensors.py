"""Makes safetensors of PyTorch's pickles (.pth, .pt, .bin), which the library itself never reads.

    python -m tools.torch_to_safetensors eva_vit_g.pth out/eva_vit_g.safetensors
    python -m tools.torch_to_safetensors open_clip_pytorch_model.bin out/biomedclip.safetensors
    python -m tools.torch_to_safetensors out/pefomed/checkpoint_49.pth out/pefomed.safetensors

Names stay as they are. Of a training checkpoint the weights alone are taken: what is under "model", "state_dict" or
"module", whichever there is. torch.load(weights_only=True) runs no code of the file; PyTorch must be installed.
"""

import os
from collections.abc import Mapping

from absl import app, flags

from paligemma_med import files
from paligemma_med.checkpoints import CheckpointError, lazy
from paligemma_med.checkpoints.hf import tensors
from paligemma_med.cli import command
from paligemma_med.pp import command_line

_INSIDE = ("model", "state_dict", "module")
_TYPES = ("float64", "float32", "float16", "bfloat16")


def convert(src: str, dst: str, *, overwrite: bool = False) -> tuple[int, list[str]]:
    """Writes the floating tensors of a pickle as one file of safetensors, which appears whole or not at all.

    Args:
      src: the pickle.
      dst: file to write, *.safetensors.
      overwrite: replace a file at `dst`.

    Returns:
      (number of tensors written, names of the entries that aren't tensors of floats, and were left out).

    Raises:
      FileNotFoundError, FileExistsError, CheckpointError: one sentence about what is wrong.
    """
    if not dst.endswith(".safetensors"):
        raise CheckpointError(f"{dst}: expected a name that ends in .safetensors")
    if not overwrite and os.path.lexists(dst):
        raise FileExistsError(f"{dst} exists; pass --overwrite to replace it")
    state, left = _floats(src, _weights(src, _load(src)))
    with files.whole_file(dst) as f:
        f.write(tensors.header((n, lazy.dtype_of(_type(x)), tuple(x.shape)) for n, x in state.items()))
        for x in state.values():
            # Bytes of any type, bfloat16 included, which PyTorch can't hand to numpy.
            f.write(x.contiguous().reshape(-1).view(_torch().uint8).numpy().data)
    return len(state), left


def _torch():
    try:
        import torch
    except ImportError as e:
        raise CheckpointError("reading PyTorch's pickles takes PyTorch: pip install torch") from e
    return torch


def _load(src):
    torch = _torch()
    if not os.path.isfile(src):
        raise FileNotFoundError(f"no file {src}: expected a pickle of PyTorch's (.pth, .pt, .bin)")
    try:
        # Mapped into memory where the file's format allows: one tensor is read at a time.
        return torch.load(src, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        pass  # PyTorch's format before 1.6 can't be mapped; what else is wrong shows again
    except Exception as e:
        raise _unreadable(src, e) from e
    try:
        return torch.load(src, map_location="cpu", weights_only=True)
    except Exception as e:  # pickle and PyTorch raise many kinds
        raise _unreadable(src, e) from e


def _unreadable(src, error):
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return CheckpointError(
        f"{src} ({os.path.getsize(src):,} bytes) can't be read as weights alone, without running code of the file "
        f"(PyTorch says: {first[:200]})"
    )


def _weights(src, found):
    """{name: anything} of the weights in a checkpoint."""
    while isinstance(found, Mapping):
        inside = next((k for k in _INSIDE if isinstance(found.get(k), Mapping)), None)
        if inside is None:
            return found
        found = found[inside]
    raise CheckpointError(f"{src} holds a {type(found).__name__}, expected a dict of tensors")


def _floats(src, found):
    """({name: tensor}, names of what is none, or has no floats)."""
    torch, state, left = _torch(), {}, []
    for name, x in found.items():
        if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.is_floating_point() and _type(x) in _TYPES:
            state[str(name)] = x.detach()
        else:
            left.append(str(name))
    if not state:
        raise CheckpointError(f"{src} holds no tensors of floats, but {', '.join(left[:5]) or 'nothing'}")
    return state, left


def _type(x):
    return str(x.dtype).removeprefix("torch.")


@command
def main(argv) -> None:
    if len(argv) != 3:
        raise app.UsageError(f"Give SRC and DST; found {argv[1:]}.")
    src, dst = (os.path.expanduser(path) for path in argv[1:])
    count, left = convert(src, dst, overwrite=flags.FLAGS.overwrite)
    also = f"; left out, since they are no weights: {', '.join(left[:10])}" if left else ""
    print(f"Wrote {dst}: {count} tensors{also}.")


if __name__ == "__main__":
    flags.DEFINE_bool("overwrite", False, "Replace what is at DST.")
    app.run(main, flags_parser=command_line.parse_flags)
