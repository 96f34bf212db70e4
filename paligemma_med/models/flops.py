"""How many floating-point operations a training step needs, and how many a chip could do.

Counted from the parameter tree: per token, a weight of a matrix product costs 2 operations forward, 2
for the gradient of its input if something below it is trained, and 2 for its own gradient if it is
trained itself. That is the "4N" of adapters on frozen weights, and the "6N" of full fine-tuning. What lies
below all trained weights only runs forward: stage 1's image tower costs 2N.

Attention's two products of activations are counted separately, over the whole square of tokens,
masked or not. Norms, softmax, embedding look-ups and the optimizer are left out, as usual. MFU, "model
FLOPs utilisation" (PaLM, arXiv 2204.02311, appendix B), is only the first figure divided by the chip's
peak: conservative, and independent of what is recomputed.
"""

import dataclasses
import math

import jax

from paligemma_med.models import connector, lora_targets, vlm
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree

ACCOUNTING = (
    "2 FLOPs forward and 2 for the input's gradient per weight and token (4N), 2 more where the "
    "weight is trained; without attention's scores and without what is computed again"
)

# What a remat policy recomputes: nothing, only attention's products, or (any other policy) everything.
_SAVES_ALL = ("none", "everything_saveable", "dots_saveable", "checkpoint_dots")
_SAVES_WEIGHT_PRODUCTS = (
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one example in a training step.

    Attributes:
      per_example_model: products with weights, which MFU is computed from.
      per_example_attention: attention's scores and weighted sums, forward and backward.
      per_example_recompute: what remat policies and chunks of the loss compute a second time.
    """

    per_example_model: int
    per_example_attention: int
    per_example_recompute: int

    @property
    def per_example_executed(self) -> int:
        """The sum of all three: what the chip does."""
        return self.per_example_model + self.per_example_attention + self.per_example_recompute


def count(model, trained, *, res, text_len, supervised_len=None, loss_chunk=None) -> Flops:
    """FLOPs of one example.

    Args:
      model: `vlm.Model`.
      trained: names of the trained parameters.
      res, text_len, supervised_len, loss_chunk: as in the config; supervised_len None: logits at
        all text_len.

    Returns:
      Flops.
    """
    sizes, trained = _Sizes(model, res), set(trained)
    backward = _backward(sizes, trained)
    weights, recompute = 0, 0
    for name, once, to_input, again in _uses(sizes, trained, text_len, supervised_len, loss_chunk):
        weights += once * (1 + to_input + (name in trained))
        recompute += once * again

    attention = 0
    for part, once in sizes.attention(text_len).items():
        attention += once * (1 + 2 * backward[part])
        if backward[part]:
            # Scores are recomputed under every policy (models/layers/attention.py).
            recompute += once // 2 + once * (sizes.policies[part] not in _SAVES_ALL)
    return Flops(weights, attention, recompute)


def weight_reads(model, trained, stored, *, res, text_len, supervised_len=None, loss_chunk=None) -> int:
    """Bytes of weights that the products of a step read if each reads its weights once: in the forward pass, where that
    is computed again, and for the gradient of its input. Norms, biases and embeddings of tokens are left out, and that
    chunks of the loss read the table once each.

    Args:
      stored: {name: bytes} of the parameters as a device multiplies by them.
      The rest as for `count`.
    """
    uses = _uses(_Sizes(model, res), set(trained), text_len, supervised_len, loss_chunk)
    return sum(stored[name] * (1 + to_input + again) for name, _, to_input, again in uses)


def _backward(sizes, trained):
    """{part: whether gradients pass through its layers}. They count as passing through all stacked layers if any of
    them is trained (in the first, they needn't pass below its lowest trained weight)."""
    lowest = min((sizes.place(n) for n in trained), default=math.inf)
    return {part: lowest <= place for part, place in sizes.stacks.items()}


def _uses(sizes, trained, text_len, supervised_len, loss_chunk):
    """(name, FLOPs of one product, whether there is one for its input's gradient, whether it is computed again) of each
    weight that multiplies."""
    logits = text_len if supervised_len is None else min(supervised_len, text_len)
    lowest = min((sizes.place(n) for n in trained), default=math.inf)
    backward = _backward(sizes, trained)
    for name, x in sizes.params.items():
        part, leaf = _part_of(name), sizes.leaves[name]
        if not leaf.inputs or sizes.is_only_read(leaf):
            continue
        if leaf.role == "table":
            # Everything trained lies below the logits. In chunks, they are computed again for the backward pass.
            yield name, 2 * x.size * logits, bool(trained), bool(loss_chunk and loss_chunk < logits)
            continue
        if sizes.reads_tower(leaf):
            to_input = lowest < sizes.beginning(part)
        else:
            to_input = backward[part] if leaf.stacked else lowest < sizes.place(name)
        # The input of an adapter's second factor comes from its first.
        to_input |= lora.is_factor(name) and name.endswith("b") and name[:-1] + "a" in trained
        again = leaf.stacked and backward[part] and sizes.is_recomputed(name)
        yield name, 2 * x.size * sizes.rows(leaf, text_len), to_input, again


class _Sizes:
    """What FLOPs depend on in a model's parts and leaves, for square images of `res` px.

    Attributes:
      params: {name: jax.ShapeDtypeStruct} of all parameters.
      leaves: {name: Leaf} of the same; an adapter's factor has its kernel's.
      stacks: {part: place of its stacked layers in the order of the computation}, or of its first leaf if
        it has none.
      policies: {part: remat policy}.
    """

    def __init__(self, model, res):
        self._table = table = model.leaves
        image = jax.ShapeDtypeStruct((res, res, 3), "float32")
        self.params = flatten_tree(vlm.abstract_params(model, image_size=res))
        self.leaves = lora_targets.leaf_by_name(table)
        self.policies = {name: getattr(part, "remat_policy", "none") for name, part in model.parts.items()}
        self._pixels = res * res
        self._patches = math.prod(vlm.patch_grid(model, image))
        cls = getattr(model.parts["img"], "cls", False)
        self._positions = self._patches + bool(cls)
        self._image_tokens = vlm.num_image_tokens(model, image)
        self._connector = connector.kind_of(model.connector)
        keeps_cls = getattr(model.parts["img"], "keep_cls", False)
        self._given = self._positions if keeps_cls else self._patches  # tokens that a connector reads
        self._logits = [leaf.path for leaf in table.values() if leaf.role == "table"][-1]
        self._places, self.stacks, self._last = {}, {}, {}
        for leaf in table.values():
            part, place = _part_of(leaf.path), self._places.setdefault(_group(leaf), len(self._places))
            if part not in self._last and (leaf.stacked or part not in self.stacks):
                self.stacks[part] = place
            # The last product of a block gives its output, unless a norm follows.
            if leaf.stacked and leaf.role in ("product", "norm"):
                self._last[part] = leaf

    def place(self, name):
        """Place in the order of the computation. A weight trained at one place needs gradients of inputs at
        all later ones."""
        return self._places[_group(self.leaves[name])]

    def beginning(self, part):
        """Place of a part's first leaf in the order of the computation."""
        return min(self.place(leaf.path) for leaf in self._table.values() if _part_of(leaf.path) == part)

    def reads_tower(self, leaf):
        """Whether a connector's product reads the tower's tokens, while others read what became of them."""
        return _part_of(leaf.path) == "connector" and leaf.folder.partition("/")[2] in self._connector.READ_TOWER

    def rows(self, leaf, text_len):
        """Tokens that a leaf's product processes."""
        part = _part_of(leaf.path)
        if part == "llm":
            return self.sequence(text_len)
        if part == "connector":
            return self._given if self.reads_tower(leaf) else self._image_tokens
        if leaf.role == "stem":  # its convolutions stand in the order of their numbers, and each halves both sides
            before = [other.path for other in self._table.values() if other.role == "stem"].index(leaf.path)
            return self._pixels // 4 ** (before + 1)
        return self._positions if leaf.stacked else self._patches

    def is_only_read(self, leaf):
        """Whether it is a table that embeds tokens while another one gives the logits."""
        return leaf.role == "table" and leaf.path != self._logits

    def sequence(self, text_len):
        """Tokens that the decoder reads."""
        return self._image_tokens + text_len

    def products(self, text_len):
        """{part: FLOPs of its products with weights in one pass}, without the vocabulary table."""
        out = dict.fromkeys(self.policies, 0)
        for name, x in self.params.items():
            leaf = self.leaves[name]
            if leaf.inputs and leaf.role != "table":
                out[_part_of(name)] += 2 * x.size * self.rows(leaf, text_len)
        return out

    def table(self):
        """Number of weights in the table that gives the logits."""
        return self.params[self._logits].size

    def attention(self, text_len):
        """{part: FLOPs of attention's two products in one pass}."""
        out = dict.fromkeys(self.stacks, 0)
        for leaf in self._table.values():
            if once := self._per_pair(leaf):
                keys = self._table.get(f"{leaf.folder.rpartition('/')[0]}/key/kernel", leaf)
                out[_part_of(leaf.path)] += once * self.rows(leaf, text_len) * self.rows(keys, text_len)
        return out

    def score(self):
        """FLOPs of the decoder's attention for a query and a key, all layers together."""
        return sum(map(self._per_pair, (leaf for leaf in self._table.values() if leaf.path.startswith("llm/"))))

    def _per_pair(self, leaf):
        """The same of one kernel that projects heads' outputs, or 0."""
        if leaf.role != "product" or not {*"NH"} <= {*leaf.inputs}:
            return 0
        size = dict(zip(leaf.axes, self.params[leaf.path].shape, strict=True))
        return 4 * size.get("L", 1) * size["N"] * size["H"]

    def is_recomputed(self, name):
        """Whether a stack's product is recomputed before its layer's backward pass."""
        part = _part_of(name)
        if self.policies[part] in (*_SAVES_ALL, *_SAVES_WEIGHT_PRODUCTS):
            return False
        # The next block has kept the output of this one, and this block's own backward pass doesn't read
        # it, unless a norm follows the last product.
        is_output = self.leaves[name] == self._last[part] and not name.endswith("lora_a")
        return not is_output


def _part_of(name):
    """The part of the model that a parameter belongs to."""
    return name.split("/")[0]


def _group(leaf):
    """Leaves with one place in the order of the computation: those of a module, or of a stack."""
    return (_part_of(leaf.path), "layers") if leaf.stacked else leaf.folder


def count_pass(model, *, res, text_len, logits) -> Flops:
    """FLOPs of one example's forward pass.

    Args:
      model: `vlm.Model`.
      res, text_len: pixels and text tokens.
      logits: how many positions have logits.

    Returns:
      Flops.
    """
    sizes = _Sizes(model, res)
    products = sum(sizes.products(text_len).values()) + 2 * sizes.table() * logits
    return Flops(products, sum(sizes.attention(text_len).values()), 0)


def count_answers(model, *, res, prompt_len, samples, tokens) -> Flops:
    """FLOPs of sampling answers to one question with `decode`: the image and the prompt are read once for
    all answers, and each token except an answer's last is read once.

    Args:
      model: `vlm.Model`.
      res, prompt_len: pixels and the prompt's tokens.
      samples, tokens: answers, and tokens of each.

    Returns:
      Flops, all answers together.
    """
    prompt = count_pass(model, res=res, text_len=prompt_len, logits=1)
    sizes = _Sizes(model, res)
    # The products of one more token, and how many tokens are seen from all those that come after the first.
    one = sizes.products(prompt_len + 1)["llm"] - sizes.products(prompt_len)["llm"]
    seen = sum(sizes.sequence(prompt_len) + i for i in range(1, tokens)) * samples
    return Flops(
        prompt.per_example_model + (one + 2 * sizes.table()) * samples * (tokens - 1),
        prompt.per_example_attention + sizes.score() * seen,
        0,
    )


# TFLOP/s in bfloat16, dense, of one JAX device. The first match counts, so longer names come first.
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


def peak(device, tflops: float | None = None) -> float | None:
    """The peak FLOP/s of `device` in bfloat16.

    Args:
      device: jax.Device.
      tflops: config.peak_tflops, which overrides the table.

    Returns:
      float, or None if unknown (a CPU, an unlisted chip).
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
