"""What the benchmarks compute: sizes, batches, what is trained, and the random numbers.

All sides take everything from here, so that they do the same work: the same weights (a Hugging Face
folder and a PEFT folder, drawn once per run), the same batch, the same trained parameters, AdamW with
the same settings. Nothing at the top of this file needs JAX or PyTorch.

    python -m tools.bench.sizes FOLDER '{"size": "bench-s", "dtype": "float32"}'

writes FOLDER/base and FOLDER/adapter.
"""

import dataclasses
import json
import math
import os
import sys

import numpy as np

from paligemma_med.models import presets


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
      img, llm: the towers, as arguments of `vlm.Model`.
      res: pixels.
      text_len: text tokens that the model reads.
      answer_len: how many of the predicted tokens are supervised, in every row.
      batch_size, dtype: defaults of the flags. dtype: of frozen weights and of activations.
      cores: how many cores all sides are bound to; None leaves them free.
      remat_policy, scan: only for our side.
    """

    img: dict
    llm: dict
    res: int
    text_len: int
    answer_len: int
    batch_size: int
    dtype: str
    cores: int | None
    remat_policy: str
    scan: bool


_3B = dict(
    **presets.PRESETS["paligemma_3b"],
    text_len=128,
    answer_len=64,
    dtype="bfloat16",
    cores=None,
    remat_policy="nothing_saveable",
    scan=True,
)

SIZES = {
    # 6 layers of 384 in the image tower, 8 of 512 in the language model: a step takes about a second on
    # two cores. A head's width is width / heads, as in Gemma.
    "bench-s": Size(
        img=dict(variant="S/14", depth=6),
        llm=dict(
            width=512,
            depth=8,
            mlp_dim=2048,
            num_heads=8,
            num_kv_heads=1,
            head_dim=64,
            vocab_size=8256,
        ),
        res=224,
        text_len=32,
        answer_len=16,
        batch_size=4,
        dtype="float32",
        cores=2,
        remat_policy="dots_with_no_batch_dims_saveable",
        scan=True,
    ),
    # 22 M in the image tower, 213 M in the language model: a size between the other two.
    "m-224": Size(
        img=dict(variant="S/14"),
        llm=dict(
            width=1024,
            depth=12,
            mlp_dim=4096,
            num_heads=8,
            num_kv_heads=1,
            head_dim=128,
            vocab_size=32_768,
        ),
        res=224,
        text_len=32,
        answer_len=16,
        batch_size=4,
        dtype="float32",
        cores=2,
        remat_policy="dots_with_no_batch_dims_saveable",
        scan=False,
    ),
    "3b-224": Size(**_3B, res=224, batch_size=8),
    "3b-448": Size(**_3B, res=448, batch_size=8),
    # For tests: every width differs from every other.
    "tiny": Size(
        img=dict(width=24, depth=2, mlp_dim=40, num_heads=3, patch_size=14),
        llm=dict(width=32, depth=3, mlp_dim=44, num_heads=4, num_kv_heads=1, head_dim=10, vocab_size=192),
        res=42,
        text_len=12,
        answer_len=5,
        batch_size=2,
        dtype="float32",
        cores=None,
        remat_policy="nothing_saveable",
        scan=True,
    ),
}

WHATS = ("lora", "stage1", "full")
DTYPES = ("float32", "bfloat16")
# The attention of both towers, as in the paper, with the rank and alpha of the adapters that its authors
# published. No dropout, so that the sides' losses can be compared.
LORA = [("img/Transformer/.*MultiHead.*/kernel|llm/layers/attn/.*", dict(rank=8, alpha=32.0))]
TRAINED = {"lora": ".*/lora_[ab]", "stage1": "img/head/.*", "full": ".*"}
PROMPT_LENGTHS = (12, 28)  # tokens, from and to: those of VQA questions
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01  # decay: PyTorch's default, multiplied by the learning rate


def check(size, what, dtype) -> None:
    """Raises ValueError for unknown names."""
    for value, known in ((size, SIZES), (what, WHATS), (dtype, (*DTYPES, None))):
        if value not in known:
            raise ValueError(f"found {value!r}; expected one of {[k for k in known if k]}.")


def optimizer() -> dict:
    """AdamW for `optim.make` and for big_vision, whose keys are the same: there decay isn't scaled by the
    learning rate, and by default only applies to kernels."""
    return dict(
        optax_name="scale_by_adam",
        lr=LEARNING_RATE,
        wd=LEARNING_RATE * WEIGHT_DECAY,
        wd_mults=[(".*", 1.0)],
    )


def draw_batch(size, rows) -> dict:
    """Numpy arrays like those of a train pp, without padding: image float32[rows, res, res, 3], text,
    mask_ar, mask_loss int32[rows, text_len + 1]."""
    rng = np.random.default_rng(1)
    length = size.text_len + 1
    answer = np.arange(length) >= length - size.answer_len
    answer = np.repeat(answer[None], rows, 0).astype(np.int32)
    return dict(
        image=rng.uniform(-1, 1, (rows, size.res, size.res, 3)).astype(np.float32),
        text=rng.integers(3, size.llm["vocab_size"], (rows, length), np.int32),
        mask_ar=answer,
        mask_loss=answer,
    )


def draw_prompts(size, rows) -> dict:
    """Numpy arrays like those of an eval pp: image float32[rows, res, res, 3], text, mask_ar, mask_input
    int32[rows, text_len]. Prompts have 12 to 28 tokens, like questions, or fewer if text_len is shorter;
    the first is the longest."""
    rng = np.random.default_rng(1)
    low, high = min(PROMPT_LENGTHS[0], size.text_len // 2), min(PROMPT_LENGTHS[1], size.text_len)
    lengths = rng.integers(low, high, rows, endpoint=True)
    lengths[0] = high
    on = np.arange(size.text_len) < lengths[:, None]
    return dict(
        image=rng.uniform(-1, 1, (rows, size.res, size.res, 3)).astype(np.float32),
        text=np.where(on, rng.integers(3, size.llm["vocab_size"], on.shape), 0).astype(np.int32),
        mask_ar=np.where(on, 0, 1).astype(np.int32),
        mask_input=on.astype(np.int32),
    )


def write_weights(folder, size, dtype) -> None:
    """Draws the weights of `size`: <folder>/base in Hugging Face's form, and an adapter <folder>/adapter in
    PEFT's. Each leaf is drawn when it is written, so that a large model needs little memory."""
    from paligemma_med import checkpoints
    from paligemma_med.checkpoints import lazy
    from paligemma_med.models import lora_targets, vlm
    from paligemma_med.models.leaves import flatten_tree, unflatten_tree

    model = vlm.Model(img=size.img, llm=size.llm)
    table = model.leaves
    tree = vlm.abstract_params(model, image_size=size.res)
    flat = flatten_tree(tree)

    def leaf(name, x):
        def draw():
            rng = np.random.default_rng([0, *name.encode()])
            out = rng.standard_normal(x.shape, np.float32)
            # Matrices as usually initialised, vectors (biases, norms) small.
            fan_in = _fan_in(table[name], x.shape)
            out *= 0.02 if fan_in is None else fan_in**-0.5
            return out.astype(lazy.dtype_of(dtype))

        return lazy.Lazy(x.shape, lazy.dtype_of(dtype), draw)

    leaves = unflatten_tree({n: leaf(n, x) for n, x in flat.items()})
    base = os.path.join(folder, "base")
    checkpoints.save_hf(base, leaves, img=dict(model.img), llm=dict(model.llm))
    specs, factors = lora_targets.resolve(LORA, flat), {}
    for target, spec in specs.items():
        a, b = lora_targets.factor_shapes(target, spec, flat[target.param].shape)
        rng = np.random.default_rng([1, *target.name.encode()])
        layers = a[0] if target.stacked else 1
        a = rng.standard_normal(a, np.float32).reshape(layers, -1, spec.rank)
        b = np.zeros(b, np.float32).reshape(layers, spec.rank, -1)
        factors[target] = a / a.shape[1] ** 0.5, b
    checkpoints.save_adapter(os.path.join(folder, "adapter"), checkpoints.Adapter(specs, factors), base_model=base)


def _fan_in(leaf, shape):
    """The fan-in of a matrix product, or the width of position embeddings; None for a vector."""
    if leaf.inputs:
        return math.prod(shape[i] for i in leaf.input_axes)
    return shape[-1] if leaf.role == "positions" else None


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    _settings = json.loads(sys.argv[2])
    write_weights(sys.argv[1], SIZES[_settings["size"]], _settings["dtype"])
