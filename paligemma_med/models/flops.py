"""How many floating-point operations a training step needs, and how many a chip could do.

Counted from the parameter tree: a weight of a matrix product costs, per token that meets it, 2
operations forward, 2 for the gradient of its input where something below it is trained, and 2 for
its own gradient where it is trained itself. That is the "4N" of adapters on frozen weights, and the
"6N" of full fine-tuning. What lies below everything that is trained runs forward only: stage 1's
image tower costs 2N.

Attention's two products of activations are counted beside that, over the whole square of tokens,
masked or not. Norms, softmax, embedding look-ups and the optimizer are left out, as is usual.
MFU, "model FLOPs utilisation" (PaLM, arXiv 2204.02311, appendix B), is the first figure alone by
the chip's peak: conservative, and the same whatever is recomputed.
"""

import dataclasses
import math

from paligemma_med.models import decoder, vit, vlm
from paligemma_med.models.leaves import flatten_tree

ACCOUNTING = (
    "2 FLOPs forward and 2 for the input's gradient per weight and token (4N), 2 more where the "
    "weight is trained; without attention's scores and without what is computed again"
)

# Parts of the model from the input up. What is trained in one asks for gradients of inputs in all
# that follow. The embedding table comes twice: it embeds the text, and gives the logits.
_ORDER = (
    "img/embedding/",
    "img/pos_embedding",
    "img/Transformer/encoderblock/",
    "img/Transformer/encoder_norm/",
    "img/head/",
    "llm/embedder/",
    "llm/layers/",
    "llm/final_norm/",
)
_LOGITS = len(_ORDER)
_STACKS = {"img": "img/Transformer/encoderblock/", "llm": "llm/layers/"}
# Their shape tells layers, heads and the width of a head.
_ATTENTION_OUT = {
    "img": "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel",
    "llm": "llm/layers/attn/attn_vec_einsum/w",
}
# The last names of weights that meet activations in a matrix product.
_PRODUCTS = ("kernel", "w", "gating_einsum", "linear", "lora_a", "lora_b", "input_embedding")

# What a remat policy computes again: nothing, attention's products alone, or (any other) all.
_SAVES_ALL = ("none", "everything_saveable", "dots_saveable", "checkpoint_dots")
_SAVES_WEIGHT_PRODUCTS = (
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one example in a training step.

    Attributes:
      per_example_model: of products with weights: what MFU is taken of.
      per_example_attention: of attention's scores and weighted sums, forward and backward.
      per_example_recompute: of what remat policies and chunks of the loss compute a second time.
    """

    per_example_model: int
    per_example_attention: int
    per_example_recompute: int

    @property
    def per_example_executed(self):
        """All three together: what the chip does."""
        return self.per_example_model + self.per_example_attention + self.per_example_recompute


def count(model, trained, *, res, text_len, supervised_len=None, loss_chunk=None):
    """FLOPs of one example.

    Args:
      model: `vlm.Model`.
      trained: names of the trained parameters.
      res, text_len, supervised_len, loss_chunk: as in the config; supervised_len None: logits at
        all text_len.

    Returns:
      Flops.
    """
    params = flatten_tree(vlm.abstract_params(model, image_size=res))
    patches = params["img/pos_embedding"].shape[1]
    logits = text_len if supervised_len is None else min(supervised_len, text_len)
    tokens = {"img": patches, "llm": patches + text_len}
    policies = {
        "img": vit.Model(**{"variant": "So400m/14", **model.img}).remat_policy,
        "llm": decoder.Model(**{"variant": "gemma_2b", **model.llm}).remat_policy,
    }
    trained = set(trained)
    lowest = min((_place(n) for n in trained), default=math.inf)
    # Where layers are stacked, all of them count as passed by gradients if any is trained (of the
    # first, what lies below its own trained weights needn't be).
    backward = {tower: lowest <= _place(stack) for tower, stack in _STACKS.items()}

    weights, recompute = 0, 0
    for name, leaf in params.items():
        tower, last = name.split("/")[0], name.rpartition("/")[2]
        if last not in _PRODUCTS:
            continue
        in_stack = name.startswith(_STACKS[tower])
        if last == "input_embedding":
            once = 2 * leaf.size * logits
            to_input = lowest < _LOGITS
            # In chunks, logits are computed again for the backward pass.
            if loss_chunk and loss_chunk < logits:
                recompute += once
        else:
            once = 2 * leaf.size * tokens[tower]
            to_input = backward[tower] if in_stack else lowest < _place(name)
            # The input of an adapter's second factor comes from its first.
            to_input |= last == "lora_b" and name[:-1] + "a" in trained
        weights += once * (1 + to_input + (name in trained))
        if in_stack and backward[tower] and _is_recomputed(name, params, policies[tower]):
            recompute += once

    attention = 0
    for tower, out in _ATTENTION_OUT.items():
        layers, heads, width, _ = params[out].shape
        once = 4 * layers * heads * width * tokens[tower] ** 2
        attention += once * (1 + 2 * backward[tower])
        if backward[tower]:
            # Scores are made again, whatever is kept (models/attention.py).
            recompute += once // 2 + once * (policies[tower] not in _SAVES_ALL)
    return Flops(weights, attention, recompute)


def count_pass(model, *, res, text_len, logits):
    """FLOPs of one example's forward pass.

    Args:
      model: `vlm.Model`.
      res, text_len: pixels and text tokens.
      logits: how many positions have logits.

    Returns:
      Flops.
    """
    weights, table, patches, score = _parts(model, res)
    tokens = {"img": patches, "llm": patches + text_len}
    products = sum(2 * weights[k] * n for k, n in tokens.items()) + 2 * table * logits
    return Flops(products, sum(score[k] * n**2 for k, n in tokens.items()), 0)


def count_answers(model, *, res, prompt_len, samples, tokens):
    """FLOPs of drawing answers to one question as `decode` does: the image and the prompt are read
    once, however many answers there are, and each token but an answer's last is read once.

    Args:
      model: `vlm.Model`.
      res, prompt_len: pixels and the prompt's tokens.
      samples, tokens: answers, and tokens of each.

    Returns:
      Flops, all answers together.
    """
    prompt = count_pass(model, res=res, text_len=prompt_len, logits=1)
    weights, table, patches, score = _parts(model, res)
    steps = samples * (tokens - 1)
    seen = sum(patches + prompt_len + i for i in range(1, tokens)) * samples
    return Flops(
        prompt.per_example_model + 2 * (weights["llm"] + table) * steps,
        prompt.per_example_attention + score["llm"] * seen,
        0,
    )


def _parts(model, res):
    """({tower: weights of its products}, those of the vocabulary table, image tokens, {tower: FLOPs
    of attention's two products for a query and a key})."""
    params = flatten_tree(vlm.abstract_params(model, image_size=res))
    weights, table = {"img": 0, "llm": 0}, 0
    for name, leaf in params.items():
        last = name.rpartition("/")[2]
        if last == "input_embedding":
            table += leaf.size
        elif last in _PRODUCTS:
            weights[name.split("/")[0]] += leaf.size
    scores = {}
    for tower, out in _ATTENTION_OUT.items():
        layers, heads, width, _ = params[out].shape
        scores[tower] = 4 * layers * heads * width
    return weights, table, params["img/pos_embedding"].shape[1], scores


def _place(name):
    """Index in _ORDER of the part that a parameter belongs to."""
    return next(i for i, part in enumerate(_ORDER) if name.startswith(part))


def _is_recomputed(name, params, policy):
    """Whether a stack's product is computed again before its layer's backward pass."""
    if policy in (*_SAVES_ALL, *_SAVES_WEIGHT_PRODUCTS):
        return False
    # The block's last product gives its output, which the next block has kept, and which nothing
    # in its own backward pass reads, unless there is a norm behind it.
    ends_block = "/Dense_1/kernel", "/Dense_1/lora_b", "/mlp/linear", "/mlp/down/lora_b"
    return "llm/layers/post_ffw_norm/scale" in params or not name.endswith(ends_block)


# TFLOP/s in bfloat16, dense, of one JAX device. First match counts, so longer names come first.
# NVIDIA: data sheets (figures "with sparsity" halved) and, for GeForce and RTX, the appendices of
# the Ampere GA102 and Ada architecture papers (float32 accumulation). TPU: "System architecture" in
# Google's documentation; a JAX device of v2 and v3 is one of a chip's two cores.
_PEAKS = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("L40S", 362.1),
    ("L40", 181.1),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("TPU v6 lite", 918.0),
    ("TPU v6e", 918.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5p", 459.0),
    ("TPU v5", 459.0),
    ("TPU v4", 275.0),
    ("TPU v3", 61.5),
    ("TPU v2", 22.5),
)


def peak(device, tflops=None):
    """FLOP/s that `device` could do at most in bfloat16.

    Args:
      device: jax.Device.
      tflops: config.peak_tflops, which is believed over the table.

    Returns:
      float, or None where it isn't known (a CPU, an unlisted chip).
    """
    if tflops:
        return tflops * 1e12
    kind = device.device_kind.lower()
    for name, value in _PEAKS:
        at = kind.find(name.lower())
        # "A30" is not "A300": the name must end there. Letters may follow: "A100-SXM4-80GB".
        if at >= 0 and not kind[at + len(name) :][:1].isalnum():
            return value * 1e12
    return None
