"""What the programs need from JAX under private names: the only file that imports `jax._src`.

A release of JAX may move such a name at any time. Each function then falls back to a weaker answer, which
its docstring states, and the programs keep running.
"""

import contextlib
import os


def process_index() -> int | None:
    """This process's number in the run, or None if unknown; for messages only.

    `jax.process_index` would start the devices, which may be what failed, and wait for the other
    processes.
    """
    try:
        from jax._src import distributed

        return distributed.global_state.process_id
    except (ImportError, AttributeError):
        return None


def is_cloud_tpu() -> bool:
    """Whether JAX found itself on a Cloud TPU machine when it was imported.

    The fallback is an environment variable that JAX sets there for the TPU's runtime.
    """
    try:
        from jax._src import cloud_tpu_init

        return bool(cloud_tpu_init.running_in_cloud_tpu_vm)
    except (ImportError, AttributeError):
        return os.environ.get("TPU_ML_PLATFORM") == "JAX"


def is_whole_cache_entry(packed) -> bool:
    """Whether the bytes of a file in JAX's compilation cache decompress.

    True if that can't be checked: JAX then warns of a truncated entry, and compiles.
    """
    try:
        from jax._src.compilation_cache import decompress_executable
    except ImportError:
        return True
    try:
        decompress_executable(packed)
    except Exception:  # from zlib, zstandard or Python's own zstd, whichever JAX compressed with
        return False
    return True


@contextlib.contextmanager
def answers_for_gpu(capability, cudnn):
    """Within it JAX's cuDNN attention is traced for a GPU that isn't here: its questions to the local device and
    library are answered.

    The fallback is no answer: tracing attn_impl="cudnn" then fails in one sentence.

    Args:
      capability: (major, minor) of the GPU. cudnn: (major, minor, patch) of the library.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused
    except ImportError:
        yield
        return
    major, minor, patch = cudnn
    answers = {
        "check_cudnn_version": lambda: major * 10_000 + minor * 100 + patch,
        "check_compute_capability": lambda text: capability >= _capability(text),
        "is_cuda_compute_capability_equal": lambda text: capability == _capability(text),
    }
    before = {name: getattr(fused, name) for name in answers if hasattr(fused, name)}
    try:
        for name in before:
            setattr(fused, name, answers[name])
        yield
    finally:
        for name, value in before.items():
            setattr(fused, name, value)


def _capability(text):
    """ "9.0" → (9, 0)."""
    return tuple(map(int, text.split(".")))
