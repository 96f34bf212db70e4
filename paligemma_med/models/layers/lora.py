"""LoRA: low-rank adapters in the activation path, y = x·W + s·(x·A)·B.

Added to a bfloat16 W, the small product A·B would mostly be rounded away; so it is applied to the
activations instead, and W is unchanged. The factors `lora_a` and `lora_b` are next to the kernel that they
adapt, with PEFT's shapes except that heads keep a separate axis. A kernel that holds several projections
(`kv_einsum/w`, `gating_einsum`) has factors for each of these "parts", one folder down:
`kv_einsum/k/lora_a`, `mlp/gate/lora_a`.

LoRA is arXiv 2106.09685; initialisation and scale are those of PEFT (peft/tuners/lora/layer.py);
rank-stabilised scaling is arXiv 2312.03732. `models/lora_targets.py` knows what can be adapted in a model.
"""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_med.models import regexes
from paligemma_med.models.layers import quantised

# Far above what anybody sets. Beyond it factors would overflow in float32, or in 16 bits.
_MAX_ALPHA = 1e6


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool)


@dataclasses.dataclass(frozen=True)
class Spec:
    """How one projection is adapted.

    Attributes:
      rank: R, inner width of the adapter.
      alpha: numerator of the scale; None means `rank`, i.e. a scale of 1.
      dropout: share of the adapter's inputs dropped in training.
      rslora: divide by sqrt(rank) instead of rank.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank < 2**31:
            raise ValueError(f"LoRA rank is {self.rank!r:.40}; expected a whole number, 1 or more.")
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if not (_is_number(self.alpha) and 0 < self.alpha <= _MAX_ALPHA):
            raise ValueError(f"LoRA alpha is {self.alpha!r:.40}; expected a number above 0, up to {_MAX_ALPHA:g}.")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"LoRA dropout is {self.dropout!r:.40}; expected 0 up to below 1.")
        if not isinstance(self.rslora, bool):
            raise ValueError(f"LoRA rslora is {self.rslora!r:.40}; expected True or False.")

    @property
    def scale(self) -> float:
        """The factor on (x·A)·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


FACTORS = ("lora_a", "lora_b")


def as_rules(rules) -> tuple[tuple[str, Spec | None], ...]:
    """config.lora → a hashable tuple ((regex, Spec or None), …).

    Args:
      rules: [(regex, dict(rank=…, alpha=…, dropout=…, rslora=…)), …] or None. A regex must match
        the whole path of a kernel ("llm/layers/attn/kv_einsum/w": all projections in it) or, for
        one of several, path:part ("llm/layers/attn/kv_einsum/w:v"). The first match wins; None
        instead of a dict leaves a projection without adapter.

    Raises:
      ValueError: another form.
    """
    out = []
    for rule in rules or ():
        if isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(f"lora: {rule!r} is no (regex, dict(rank=…)) pair.")
        regex, spec = rule
        try:
            regexes.compile(regex)
        except ValueError as e:
            raise ValueError(f"lora: {regex!r:.100} {e}.") from None
        if spec is not None and not isinstance(spec, Spec):
            if not isinstance(spec, Mapping) and not hasattr(spec, "to_dict"):
                raise ValueError(f"lora: {regex!r} has {spec!r}; expected dict(rank=…) or None.")
            try:
                spec = Spec(**dict(spec))
            except TypeError as e:
                known = [f.name for f in dataclasses.fields(Spec)]
                raise ValueError(f"lora: {regex!r} has {spec}; expected {known}: {e}.") from None
        out.append((regex, spec))
    return tuple(out)


def find(rules, param: str, part: str = "") -> Spec | None:
    """The Spec that `rules` (from `as_rules`) give a projection, or None."""
    names = (param, f"{param}:{part}") if part else (param,)
    for regex, spec in rules:
        if any(regexes.fullmatch(regex, n) for n in names):
            return spec
    return None


def is_factor(name: str) -> bool:
    """Whether a path is that of an adapter's factor."""
    return name.rpartition("/")[2] in FACTORS


def _uniform(key, shape, dtype):
    """Kaiming-uniform with a = √5 over all axes except the last: within ±1 / √inputs."""
    bound = 1.0 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _low_rank(module, spec, x, inputs, outputs, deterministic):
    """s·(x·A)·B, with the factors as parameters of `module`. outputs: the result's shape after x's rows."""
    a = module.param("lora_a", _uniform, (*x.shape[x.ndim - inputs :], spec.rank), jnp.float32)
    b = module.param("lora_b", nn.initializers.zeros_init(), (spec.rank, *outputs), jnp.float32)
    if spec.dropout:
        x = nn.Dropout(spec.dropout, deterministic=deterministic, name="lora_dropout")(x)
    with jax.named_scope("lora"):  # shows these products in a profile
        low = jnp.tensordot(x, a.astype(x.dtype), inputs)
        return jnp.tensordot(low * jnp.asarray(spec.scale, x.dtype), b.astype(x.dtype), 1)


class _Part(nn.Module):
    """The adapter of a projection that shares its kernel with others."""

    spec: Spec
    inputs: int
    outputs: tuple[int, ...]
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        return _low_rank(self, self.spec, x, self.inputs, self.outputs, self.deterministic)


def add(module: nn.Module, y: jax.Array, x: jax.Array, param: str, part: str = "", *, inputs: int = 1) -> jax.Array:
    """`y`, the output of a projection of `x`, plus its adapter's if it has one.

    Call it in a compact method of the module that owns the kernel.

    Args:
      module: has the attributes `lora` (from `as_rules`) and `deterministic`.
      y: float[…rows, …outputs].
      x: float[…rows, …inputs].
      param, part: the kernel's name in `module`, and the projection's in the kernel.
      inputs: number of input axes, the last of x.
    """
    spec = find(module.lora, "/".join((*module.path, param)), part)
    if spec is None:
        return y
    outputs = y.shape[x.ndim - inputs :]
    if part:
        delta = _Part(spec, inputs, outputs, module.deterministic, name=part)(x)
    else:
        delta = _low_rank(module, spec, x, inputs, outputs, module.deterministic)
    return y + delta.astype(y.dtype)


class Dense(nn.Module):
    """A linear map of the last axes, with an adapter if the rules say so.

    Parameters, their initial values and the result are those of nn.DenseGeneral, which couldn't read
    a quantised kernel (`quantised.product`).

    Attributes:
      features: size or sizes of the output's axes.
      inputs: number of input axes, the last of x.
      dtype: of the computation.
      bias: whether there is one.
    """

    features: int | tuple[int, ...]
    inputs: int = 1
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    bias: bool = True
    lora: tuple = ()
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        features = self.features if isinstance(self.features, tuple) else (self.features,)
        ins = x.shape[x.ndim - self.inputs :]
        flat = math.prod(ins), math.prod(features)  # initialisers expect a matrix

        def kernel_init(key, shape, dtype):
            return self.kernel_init(key, flat, dtype).reshape(shape)

        kernel = quantised.param(self, "kernel", kernel_init, (*ins, *features))
        if self.bias:
            bias = self.param("bias", lambda key: self.bias_init(key, flat[1:], jnp.float32).reshape(features))
        x = x.astype(self.dtype)
        axes = range(x.ndim - self.inputs, x.ndim), range(self.inputs)
        y = quantised.product(lambda x, w: jax.lax.dot_general(x, w, (axes, ((), ()))), x, kernel)
        y = y + bias.astype(y.dtype) if self.bias else y
        return add(self, y, x, "kernel", inputs=self.inputs)


class Einsum(nn.Module):
    """A weight `w` applied by an einsum, cast to the input's type inside the layer: a cast outside the
    scan would hold a second copy of the whole stack (see `quantised`).

    With `parts`, the output's third axis is over the parts, and each may have an adapter. (On the first
    axis the product would be w·x, for which XLA copies x transposed.)"""

    shape: tuple[int, ...]
    w_init: nn.initializers.Initializer
    lora: tuple
    deterministic: bool
    inputs: int = 1
    parts: str = ""

    @nn.compact
    def __call__(self, eqn, x):
        w = quantised.param(self, "w", self.w_init, self.shape)
        y = quantised.product(lambda x, w: jnp.einsum(eqn, x, w), x, w)
        if self.parts:
            return [add(self, y[:, :, i], x, "w", part) for i, part in enumerate(self.parts)]
        return add(self, y, x, "w", inputs=self.inputs)
