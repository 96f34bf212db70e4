"""What a program that samples answers takes and does on a chip that needn't be here.

    python -m tools.bench.decode_compiled --config=configs/stage2_rocov2.py:res=448 --chip=h200 --rows=64 --samples=5

Compiles `decode.generate` on abstract arrays, all weights in bfloat16 on one device, and prints memory, what the
compiled program does (`parallel.compiled`), and bytes moved for one token after the first. The loop over tokens ends
when all answers have: its length isn't known, so that it counts once. Where the program chooses, as between top-k and
none, both count.
"""

import contextlib
import importlib

import jax
from absl import app, flags
from jax.sharding import SingleDeviceSharding
from ml_collections import config_flags

from paligemma_med import cli
from paligemma_med.models import flops
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.parallel import chips, compiled, hlo
from paligemma_med.setup import TrainingSetup

_decoding = importlib.import_module("paligemma_med.decode.generate")  # the package has a function of that name


def lowered(setup, device, rows, samples, prompt, new) -> jax.stages.Lowered:
    """`decode.generate` of so many prompts, lowered for `device`."""
    where = SingleDeviceSharding(device)

    def s(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    params = unflatten_tree({n: s(x.shape, "bfloat16") for n, x in setup.abstract.items()})
    res = setup.config.res
    batch = dict(image=s((rows, res, res, 3), "float32"), skip=s((rows,), "bool"), row_id=s((rows,), "uint32"))
    batch |= {k: s((rows, prompt), "int32") for k in ("text", "mask_ar", "mask_input")}
    key = jax.eval_shape(lambda: jax.random.key(0))
    static = ("model", "max_new_tokens", "num_samples", "greedy", "text_len")
    # The traced function itself: `lean.jit` looks at weights that are there.
    function = jax.jit(_decoding._generate.__wrapped__, static_argnames=static)
    numbers = [s((), "float32")] * 3  # temperature, top_k, top_p
    counts = dict(max_new_tokens=new, num_samples=samples, greedy=False, text_len=prompt)
    key = s(key.shape, key.dtype)
    return function.lower(setup.model, params, batch, key, *numbers, _decoding.stop_tokens(1), **counts)


def per_token(program: hlo.Program) -> int:
    """Bytes moved for one token: within the loop that has no known length."""
    for x in program.computations[program.entry].values():
        if x.opcode == "while" and program.length(x) is None:
            return compiled.moved(program, within=x.called("body")[0])
    return 0


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    chip = None
    if values.chip is not None:
        jax.config.update("jax_platforms", "cpu")
        chip = chips.find(values.chip)
    with chip.target() if chip else contextlib.nullcontext():
        setup = TrainingSetup.without_data(values.config)
        device = chip.devices[0] if chip else jax.devices()[0]
        sizes = values.rows, values.samples, values.prompt, values.new
        made = chips.compile_for_target(lowered(setup, device, *sizes))
    memory, program = made.memory_analysis(), hlo.Program(made.as_text())
    print(f"{values.rows} prompts × {values.samples} answers on one {device.device_kind}, GiB:")
    print(f"  arguments {memory.argument_size_in_bytes / 2**30:.3f}, temporary {memory.temp_size_in_bytes / 2**30:.3f}")
    print(compiled.described(program, flops.peak(device), chip.bandwidth if chip else None))
    print(f"  {'of it a token, GiB moved':<26} {per_token(program) / 2**30:.4g}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Experiment: configs/x.py[:arg=value,…].")
    flags.DEFINE_string("chip", None, "Compile for this chip, not for what is here: h200, v5e:1x1, …")
    flags.DEFINE_integer("rows", 64, "Prompts at a time.", lower_bound=1)
    flags.DEFINE_integer("samples", 5, "Answers to each.", lower_bound=1)
    flags.DEFINE_integer("prompt", 64, "Tokens of a prompt.", lower_bound=1)
    flags.DEFINE_integer("new", 64, "Tokens of an answer, at most.", lower_bound=1)
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=cli.parse_flags)
