"""Chips that aren't here: programs are compiled for a GPU or TPU on a machine that has none.

XLA's compilers for both need no device, but a description of one. A compiled program tells how much memory it takes on
the chip, which kernels it runs and what chips send each other; not how long that takes.

    h200            one GPU of GPUS
    h100:8          eight of them on one host
    a100-80:4x8     four hosts with eight each
    v5e:4x4         a slice of TPUs in Google's notation; v5p's and v4's have three numbers, v5p:2x2x1

Facts about GPUs: H200, H100, A100, A6000 and B200 as in OpenXLA's own descriptions (openxla/xla,
xla/backends/gpu/target_config/specs), L4, RTX 4090 and T4 from NVIDIA's data sheets and from the table of compute
capabilities in the CUDA C++ Programming Guide. Facts about TPUs: Google Cloud's documentation.
"""

import contextlib
import dataclasses
import os
import re

import jax

from paligemma_med.parallel import jax_private


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as XLA's compiler wants to know it.

    Attributes:
      kind: name as the driver gives it.
      capability: (major, minor) of its compute capability.
      cores: multiprocessors. fpus: float32 units in each.
      memory, l2: bytes. bandwidth: bytes a second. clock: GHz.
      shared, shared_optin: bytes of shared memory of a multiprocessor, and at most of a block.
      threads: at most, on a multiprocessor.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    memory: int
    bandwidth: float
    l2: int
    clock: float
    shared: int
    shared_optin: int
    threads: int


_HOPPER = dict(fpus=128, shared=233_472, shared_optin=232_448, threads=2048)
_AMPERE = dict(capability=(8, 0), cores=108, fpus=64, l2=40 * 2**20, clock=1.41, threads=2048)
_AMPERE |= dict(shared=167_936, shared_optin=166_912)
_ADA = dict(capability=(8, 9), fpus=128, shared=102_400, shared_optin=101_376, threads=1536)
_MIB = 2**20

GPUS = {
    "h200": Gpu(
        "NVIDIA H200", (9, 0), 132, memory=151_397_597_184, bandwidth=4.8e12, l2=50 * _MIB, clock=1.98, **_HOPPER
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        132,
        memory=84_942_979_072,
        bandwidth=3.35232e12,
        l2=50 * _MIB,
        clock=1.98,
        **_HOPPER,
    ),
    "b200": Gpu(
        "NVIDIA B200",
        (10, 0),
        148,
        memory=191_514_411_008,
        bandwidth=7.67232e12,
        l2=132_644_864,
        clock=1.965,
        **_HOPPER,
    ),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", memory=85_100_068_864, bandwidth=2.03904e12, **_AMPERE),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", memory=42_331_013_120, bandwidth=1.5552e12, **_AMPERE),
    "a6000": Gpu(
        "NVIDIA RTX A6000",
        **{**_ADA, "capability": (8, 6)},
        cores=84,
        memory=51_041_271_808,
        bandwidth=0.768096e12,
        l2=6 * _MIB,
        clock=1.8,
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", cores=128, memory=24_564 * _MIB, bandwidth=1.008e12, l2=72 * _MIB, clock=2.52, **_ADA
    ),
    "l4": Gpu("NVIDIA L4", cores=58, memory=23_034 * _MIB, bandwidth=0.3e12, l2=48 * _MIB, clock=2.04, **_ADA),
    "t4": Gpu(
        "Tesla T4",
        (7, 5),
        40,
        64,
        memory=15_360 * _MIB,
        bandwidth=0.32e12,
        l2=4 * _MIB,
        clock=1.59,
        shared=65_536,
        shared_optin=65_536,
        threads=1024,
    ),
}

# Bytes of memory of a chip; bytes a second of it; how Google calls its machines, which its compiler wants to know.
TPUS = {
    "v4": (32 * 2**30, 1.228e12, "v4-8"),
    "v5e": (16 * 2**30, 0.819e12, "v5litepod-4"),
    "v5p": (95 * 2**30, 2.765e12, "v5p-8"),
    "v6e": (32 * 2**30, 1.64e12, "v6e-4"),
}

CUDNN = (9, 10, 0)  # the version whose kernels are asked for

# Autotuning tries kernels on the GPU; without one XLA takes those it expects most of.
_GPU_OPTIONS = (("xla_gpu_autotune_level", 0),)

_target = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip and how many.

    Attributes:
      name: as it was given.
      platform: "gpu" or "tpu".
      devices: compile-only devices, all of them.
      memory: bytes of each.
      options: (name, value) pairs for `jax.stages.Lowered.compile`.
      bandwidth: bytes a second of each one's memory; None if unknown.
    """

    name: str
    platform: str
    devices: tuple
    memory: int
    options: tuple
    bandwidth: float | None = None

    @contextlib.contextmanager
    def target(self):
        """Within it meshes are of this chip's devices, and what is traced and compiled is for it."""
        gpu = GPUS.get(self.name.partition(":")[0])
        answers = jax_private.answers_for_gpu(gpu.capability, CUDNN) if gpu else contextlib.nullcontext()
        with _target(self), answers:
            yield


def target() -> Chip | None:
    """The chip that programs are compiled for; None: this machine's devices."""
    return _target.value


def backend() -> str:
    """What programs are traced for: "cpu", "gpu" or "tpu"."""
    return _target.value.platform if _target.value else jax.default_backend()


@contextlib.contextmanager
def aimed_at(name: str | None):
    """Within it programs are for the chip of this name, as a flag --chip gives it; None: for this machine's devices.
    The context's value is the `Chip`, or None. Raises like `find`."""
    if name is None:
        yield None
        return
    jax.config.update("jax_platforms", "cpu")  # or JAX would look for such chips here
    chip = find(name)
    with chip.target():
        yield chip


def compile_for_target(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """`lowered.compile()` as the target wants it."""
    chip = _target.value
    if chip is None:
        return lowered.compile()
    options = dict(chip.options)
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as e:
        # Without autotuning XLA guesses Triton's tiles, and now and then guesses some that don't exist.
        if chip.platform != "gpu" or "output tile sizes" not in str(e):
            raise
    return lowered.compile({**options, "xla_gpu_enable_triton_gemm": False})


def find(name: str) -> Chip:
    """The chips that a name stands for; see this file's docstring.

    Raises:
      ValueError: an unknown name; the compiler isn't installed.
    """
    kind, colon, many = name.partition(":")
    many = many if colon else "1"
    if kind in GPUS and re.fullmatch(r"([1-9]\d{0,3}x)?[1-9]\d{0,3}", many):
        return _gpus(name, GPUS[kind], many)
    if kind in TPUS and re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", many):
        return _tpus(name, kind, many)
    raise ValueError(
        f"--chip={name} isn't known: expected one of {', '.join(GPUS)}, with :8 for eight on a host and :4x8 for four "
        f"hosts with eight each, or one of {', '.join(TPUS)} with the slice's shape, such as v5e:4x4."
    )


def _gpus(name, gpu, many):
    hosts, _, each = many.rpartition("x")
    topology = f"1x{hosts or 1}x{each}"
    devices = _devices(
        name, "chips-gpu", platform="cuda", topology_name=name, topology=topology, target_config=spec(gpu)
    )
    return Chip(name, "gpu", devices, gpu.memory, _GPU_OPTIONS, gpu.bandwidth)


def _tpus(name, kind, shape):
    memory, bandwidth, machine = TPUS[kind]
    # libtpu otherwise asks a metadata server who it is, for minutes, and lets one process in at a time.
    for variable, value in dict(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE=machine,
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    ).items():
        os.environ.setdefault(variable, value)
    devices = _devices(name, "chips-tpu", platform="tpu", topology_name=f"{kind}:{shape}")
    return Chip(name, "tpu", devices, memory, (), bandwidth)


def _devices(name, extra, **kw):
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(**kw).devices)
    except (RuntimeError, ValueError, NotImplementedError, ImportError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(
            f"--chip={name}: its compiler can't be started ({reason[:300]}). It comes with "
            f"pip install 'paligemma_med[{extra}]', in the version of JAX that is installed."
        ) from e


def spec(gpu: Gpu) -> str:
    """A GPU as a GpuTargetConfigProto in text form, which XLA's compiler reads."""
    major, minor = gpu.capability
    info = dict(
        threads_per_block_limit=1024,
        threads_per_warp=32,
        shared_memory_per_block=49_152,
        shared_memory_per_core=gpu.shared,
        threads_per_core_limit=gpu.threads,
        core_count=gpu.cores,
        fpus_per_core=gpu.fpus,
        block_dim_limit_x=2**31 - 1,
        block_dim_limit_y=65_535,
        block_dim_limit_z=65_535,
        memory_bandwidth=int(gpu.bandwidth),
        l2_cache_size=gpu.l2,
        clock_rate_ghz=gpu.clock,
        device_memory_size=gpu.memory,
        shared_memory_per_block_optin=gpu.shared_optin,
        registers_per_core_limit=65_536,
        registers_per_block_limit=65_536,
    )
    lines = [f"  {key}: {value}" for key, value in info.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    versions = " ".join(f"{k}: {v}" for k, v in zip(("major", "minor", "patch"), CUDNN))
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {versions} }}",
            f'device_description_str: "{gpu.kind}"',
        ]
    )
