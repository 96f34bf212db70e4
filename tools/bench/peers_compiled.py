"""The training step of ours, of big_vision and of keras-hub, compiled for the same chip on the same work.

    python -m tools.bench.peers_compiled --side=ours --what=full --chip=h200
    BIG_VISION_DIR=~/big_vision python -m tools.bench.peers_compiled --side=big_vision --what=full --chip=h200
    python -m tools.bench.peers_compiled --side=keras_hub --what=lora --dtype=bfloat16 --chip=h200

Nothing is allocated: each step is traced on shapes, and the chip needn't be here (`parallel.chips`). What the compiled
program takes and does is counted in its text, for all in the same way (`parallel.compiled`). The sizes, what is trained
and the optimizer are those of the other benchmarks (`tools.bench.sizes`).

    ours        The step of `training.step`, as a dry run compiles it.
    big_vision  As in `peers_big_vision`: its model and optimizer, in the form of its trainer's update step; for "lora"
                with our adapters in its attention. On several devices its "fsdp" rule cuts weights and optimizer state.
    keras_hub   The `train_step` of its PaliGemmaCausalLM on the JAX backend, with its own LoRA. On one device.

With --dtype=bfloat16 all compute in bfloat16 and hold frozen weights so. Ours holds trained ones in float32. keras-hub
does if all are trained (its policy is then "mixed_bfloat16"), else they are bfloat16, too.
"""

import collections
import contextlib
import dataclasses
import functools
import os
from unittest import mock

import flax.linen as nn
import jax
import ml_collections
from absl import app, flags

from paligemma_med import cli
from paligemma_med.models import decoder, flops, vit
from paligemma_med.parallel import chips, compiled, hlo, notes, sharding
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run
from tools.bench import sizes

# keras-hub's names of the projections that `sizes.LORA` adapts.
_KERAS_LORA = ["query_proj", "key_proj", "value_proj", "out_proj", "query", "key", "value", "attention_output"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is compiled.

    Attributes:
      size: one of `sizes.SIZES`. what: one of `sizes.WHATS`. dtype: one of `sizes.DTYPES`. rows: of a batch.
      devices: that it is compiled for.
      attn_impl: only of ours. cut_logits: whether ours computes logits of supervised tokens alone, which the others
        can't. remat: whether keras-hub computes each layer's activations again, as the others always do.
    """

    size: sizes.Size
    what: str
    dtype: str
    rows: int
    devices: tuple
    attn_impl: str = "xla"
    cut_logits: bool = False
    remat: bool = False

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh([(sharding.DATA_AXIS, -1)], self.devices)

    def batch(self) -> dict:
        """{key: jax.ShapeDtypeStruct} of what `sizes.draw_batch` draws."""
        size = self.size
        shapes = {k: ((self.rows, size.text_len + 1), "int32") for k in ("text", "mask_ar", "mask_loss")}
        shapes["image"] = ((self.rows, size.res, size.res, 3), "float32")
        return {k: jax.ShapeDtypeStruct(*x, sharding=sharding.batch_sharding(self.mesh)) for k, x in shapes.items()}


def config_of(work: Work) -> ml_collections.ConfigDict:
    """A config of ours."""
    size = work.size
    c = ml_collections.ConfigDict(sizes.optimizer())
    c.model = {k: dict(tower, scan=size.scan, remat_policy=size.remat_policy) for k, tower in towers(size).items()}
    c.res, c.text_len, c.tokenizer = size.res, size.text_len, "tiny"
    c.dtype = c.frozen_dtype = work.dtype
    c.attn_impl = work.attn_impl
    c.input = dict(data=dict(name="none", split="train"), pp="none", batch_size=work.rows)  # never opened
    c.sharding_strategy = [(".*", 'fsdp(axis="data")')]
    if work.cut_logits:
        c.supervised_len = size.answer_len
    if work.what == "lora":
        c.lora = sizes.LORA
    trained = [(sizes.TRAINED[work.what], dict(decay_type="constant"))]
    c.schedule = trained + ([] if work.what == "full" else [(".*", None)])
    return c


def towers(size) -> dict:
    return dict(img=size.img, llm=size.llm)


def ours(work: Work) -> jax.stages.Lowered:
    """Our step, lowered."""
    setup = TrainingSetup.without_data(config_of(work), mesh=work.mesh)
    with sharding.rules(setup.config, setup.mesh):
        return dry_run.trace_step(setup).traced.lower()


def big_vision(work: Work) -> jax.stages.Lowered:
    """big_vision's step, lowered.

    Raises:
      ValueError: $BIG_VISION_DIR is no checkout; a type that it can't compute in.
    """
    from tools.bench import peers_big_vision as its

    if work.dtype != "float32":
        raise ValueError(f"big_vision's Gemma computes in float32 alone, found --dtype={work.dtype}.")
    paligemma, its_gemma, bv_optax, its_sharding = its.load_big_vision()
    model, batch = its.make_model(paligemma, its_gemma, work.size), work.batch()

    def init(batch):
        with its.adapted(work.what):
            key = jax.random.key(0)
            made = model.init(key, batch["image"], batch["text"][:, :-1], batch["mask_ar"][:, :-1])
        return nn.unbox(made["params"])

    params = jax.eval_shape(init, batch)
    _, config, tx = its.make_optimizer(bv_optax, params, work.what)
    state = dict(params=params, opt=jax.eval_shape(tx.init, params))
    where = its_sharding.infer_sharding(state, [(".*", 'fsdp(axis="data")')], work.mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
    update = its.make_update(model, bv_optax, config, tx, work.what)
    update = jax.jit(update, donate_argnums=0, out_shardings=(where, sharding.replicated(work.mesh)))
    with jax.set_mesh(work.mesh), nn.logical_axis_rules([("act_batch", "data")]):
        return update.lower(state, batch)


def keras_hub(work: Work) -> jax.stages.Lowered:
    """keras-hub's step, lowered.

    Raises:
      ValueError: it isn't installed, or there are several devices.
    """
    if len(work.devices) > 1:
        raise ValueError(f"--side=keras_hub is compiled for one device, found {len(work.devices)}.")
    os.environ["KERAS_BACKEND"] = "jax"
    try:
        import keras
        import keras_hub as hub
    except ImportError as e:
        raise ValueError(f"keras-hub can't be imported ({e}): pip install keras-hub.") from e
    if keras.backend.backend() != "jax":
        raise ValueError(f"Keras was imported with the {keras.backend.backend()} backend; expected jax.")
    size, made = work.size, []
    image = vit.Model(**size.img)
    text = {**decoder.VARIANTS.get(size.llm.get("variant"), {}), **size.llm}
    policy = work.dtype
    if work.what == "full" and work.dtype == "bfloat16":
        policy = "mixed_bfloat16"
    layers = [f"decoder_block_{i}" for i in range(text["depth"])] + [f"encoder_block_{i}" for i in range(image.depth)]
    remat = keras.RematScope("list_of_layers", layer_names=layers) if work.remat else contextlib.nullcontext()

    def init():
        backbone = hub.models.PaliGemmaBackbone(
            vocabulary_size=text["vocab_size"],
            image_size=size.res,
            num_layers=text["depth"],
            num_query_heads=text["num_heads"],
            num_key_value_heads=text["num_kv_heads"],
            hidden_dim=text["width"],
            intermediate_dim=2 * text["mlp_dim"],  # it counts gate and up together
            head_dim=text["head_dim"],
            vit_patch_size=image.patch_size[0],
            vit_num_heads=image.num_heads,
            vit_hidden_dim=image.width,
            vit_num_layers=image.depth,
            vit_intermediate_dim=image.mlp_dim,
            dtype=policy,
        )
        model = hub.models.PaliGemmaCausalLM(backbone=backbone, preprocessor=None)
        if work.what == "lora":
            backbone.enable_lora(sizes.LORA[0][1]["rank"], target_layer_names=_KERAS_LORA)
        elif work.what == "stage1":
            tower = backbone.vit_encoder
            for layer in [x for x in backbone.layers if x is not tower] + tower.layers:
                layer.trainable = layer.name == "image_classifier"
        optimizer = keras.optimizers.AdamW(sizes.LEARNING_RATE, weight_decay=sizes.WEIGHT_DECAY)
        model.compile(optimizer=optimizer, weighted_metrics=[])
        optimizer.build(model.trainable_variables)
        made.append(model)
        groups = model.trainable_variables, model.non_trainable_variables, optimizer.variables, model.metrics_variables
        return tuple([v.value for v in group] for group in groups)

    where = sharding.replicated(work.mesh)
    batch = work.batch()
    text_shape = jax.ShapeDtypeStruct((work.rows, size.text_len), "int32", sharding=where)
    masks = {k: text_shape for k in ("token_ids", "padding_mask", "response_mask")}
    weights = jax.ShapeDtypeStruct(text_shape.shape, "float32", sharding=where)
    # Its attention asks the local device whether it is a GPU.
    asked = mock.patch("keras_hub.src.models.gemma.gemma_attention.running_on_gpu", lambda: chips.backend() == "gpu")
    with remat, asked:
        state = jax.eval_shape(init)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
        step = jax.jit(made[0].train_step, donate_argnums=0)
        return step.lower(state, (dict(images=batch["image"], **masks), text_shape, weights))


SIDES = dict(ours=ours, big_vision=big_vision, keras_hub=keras_hub)


def largest(program: hlo.Program, most: int) -> list[tuple[str, int, int]]:
    """(what, runs, bytes moved by all of them) of the kernels that move most; those of one operation of JAX and one
    result together."""
    runs, size = collections.Counter(), collections.Counter()
    for x, place, n in compiled.moves(program):
        made = ", ".join(map(str, x.arrays[:2])) + (", …" if len(x.arrays) > 2 else "")
        what = f"{made} of {x.source[-80:] or x.target or x.opcode}"
        runs[what] += place.times
        size[what] += n * place.times
    return [(what, runs[what], n) for what, n in size.most_common(most)]


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    chip = None
    if values.chip is not None:
        jax.config.update("jax_platforms", "cpu")
        chip = chips.find(values.chip)
    with chip.target() if chip else contextlib.nullcontext():
        work = Work(
            sizes.SIZES[values.size],
            values.what,
            values.dtype,
            values.rows,
            chip.devices if chip else tuple(jax.devices()[:1]),
            values.attn_impl,
            values.cut_logits,
            values.remat,
        )
        with notes.stage(f"compiling the step of {values.side}"):
            made = chips.compile_for_target(SIDES[values.side](work))
    memory, text = made.memory_analysis(), made.as_text()
    if values.save:
        with open(values.save, "w", encoding="utf-8") as f:
            f.write(text)
    program, device, gib = hlo.Program(text), work.devices[0], 2**30
    left = memory.output_size_in_bytes - memory.alias_size_in_bytes
    where = f"{len(work.devices)} × {device.device_kind}"
    print(f"{values.side}: {values.what}, {values.dtype}, {values.rows} rows on {where}; GiB on each:")
    print(f"  arguments {memory.argument_size_in_bytes / gib:.3f}, temporary {memory.temp_size_in_bytes / gib:.3f}")
    print(f"  results that take no argument's memory {left / gib:.3f}")
    print(compiled.described(program, flops.peak(device), chip.bandwidth if chip else None))
    for what, times, n in largest(program, values.kernels):
        print(f"  {n / gib:8.2f} moved in {times:5} runs: {what}")


if __name__ == "__main__":
    flags.DEFINE_enum("side", "ours", list(SIDES), "Whose step.")
    flags.DEFINE_enum("size", "3b-448", list(sizes.SIZES), "The model and its batch.")
    flags.DEFINE_enum("what", "full", sizes.WHATS, "What is trained.")
    flags.DEFINE_enum("dtype", "float32", sizes.DTYPES, "Of activations and frozen weights.")
    flags.DEFINE_integer("rows", 8, "Of a batch.", lower_bound=1)
    flags.DEFINE_enum("attn_impl", "xla", ["xla", "cudnn"], "Of ours.")
    flags.DEFINE_bool("cut_logits", False, "Ours: logits of the supervised tokens alone.")
    flags.DEFINE_bool("remat", False, "keras-hub: keep each layer's inputs alone, and compute the rest again.")
    flags.DEFINE_string("chip", None, "Compile for this chip, not for what is here: h200, h200:8, …")
    flags.DEFINE_integer("kernels", 0, "So many of those that move most are listed.", lower_bound=0)
    flags.DEFINE_string("save", None, "Write the program's text there.")
    app.run(main, flags_parser=cli.parse_flags)
