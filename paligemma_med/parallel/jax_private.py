"""What the programs need of JAX that JAX keeps under private names: the one place for `jax._src`.

A release of JAX may move such a name at any time. Each function here then answers with less, or says
that it can't answer, and the programs go on. What the caller does without is told at each.
"""

import os


def process_index():
    """This process's number in the run, or None where it isn't known.

    `jax.process_index` would start the devices, which may be what failed, and wait for the other
    processes. Needed for messages only.
    """
    try:
        from jax._src import distributed

        return distributed.global_state.process_id
    except (ImportError, AttributeError):
        return None


def is_cloud_tpu():
    """Whether JAX, when it was imported, found itself on a Cloud TPU machine.

    The fallback is a variable that JAX sets there for the TPU's runtime.
    """
    try:
        from jax._src import cloud_tpu_init

        return bool(cloud_tpu_init.running_in_cloud_tpu_vm)
    except (ImportError, AttributeError):
        return os.environ.get("TPU_ML_PLATFORM") == "JAX"


def is_whole_cache_entry(packed):
    """Whether the bytes of a file in JAX's compilation cache decompress.

    True where that can't be found out: JAX then warns of an entry that was cut off, and compiles.
    """
    try:
        from jax._src.compilation_cache import decompress_executable
    except ImportError:
        return True
    try:
        decompress_executable(packed)
    except Exception:  # of zlib, zstandard or Python's own zstd, whichever JAX compressed with
        return False
    return True
