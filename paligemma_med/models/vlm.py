"""The composite: image tokens and text, read by a language model as one sequence.

The composite gets tokens from the tower, what the language model reads of them from the connector, and
embeddings from the decoder; it doesn't reach inside any of them. Methods are named as in
big_vision/models/proj/paligemma/paligemma.py; PaliGemma is arXiv 2407.07726, PaliGemma 2 arXiv
2412.03555.

Axis letters: B batch, T text positions, Q image tokens, S = Q + T positions of the whole sequence,
D width of the language model, V vocabulary.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from paligemma_med.models import connector as connectors
from paligemma_med.models import leaves, parts, splice
from paligemma_med.models.layers import lora


class Model(nn.Module):
    """The composite.

    Attributes:
      img: the image tower's arguments, such as `variant` (PaliGemma's by default); see `vit.Model`.
      llm: the language model's arguments, likewise; see `decoder.Model`.
      dtype: type of activations in both, unless one of them has its own.
      attn_impl: "xla" or "cudnn", likewise.
      lora: adapters, [(regex, dict(rank=…, …)), …] as for `lora.as_rules`.
      connector: dict(kind=…, …) of `connector.KINDS`; None: the tower's own head projects its tokens.
      image_ar: how image tokens see each other, one of `splice.IMAGE_AR`.
      img_model: name of the tower's family (`parts.FAMILIES`).
      llm_model: name of the language model's.
    """

    img: dict | None = None
    llm: dict | None = None
    dtype: str = "float32"
    attn_impl: str = "xla"
    lora: tuple = ()
    connector: dict | None = None
    image_ar: str = "prefix"
    img_model: str = parts.default_name("img")
    llm_model: str = parts.default_name("llm")

    def __post_init__(self):
        # A model is a static argument of jitted functions and so must be hashable.
        self.img, self.llm = _frozen(self.img or {}), _frozen(self.llm or {})
        self.connector = _frozen(self.connector) if self.connector else None
        if self.image_ar not in splice.IMAGE_AR:
            raise ValueError(f"image_ar is {self.image_ar!r}; expected one of {splice.IMAGE_AR}.")
        self.lora = lora.as_rules(self.lora)
        super().__post_init__()

    def setup(self) -> None:
        for name, part in self._make_parts().items():
            setattr(self, f"_{name}", part)

    def _make_parts(self, **kw):
        """{name: module} in the order of the computation, bound to this module if it is bound.

        Args:
          kw: `parent=None` for independent modules.
        """
        both = dict(dtype=self.dtype, attn_impl=self.attn_impl, lora=self.lora)
        llm = self._make("llm", both, kw)
        kind = connectors.kind_of(self.connector)
        head = llm.width if kind is None else None
        made = {"img": self._make("img", {"num_classes": head, **both}, kw)}
        if kind is not None:
            if getattr(made["img"], "keep_cls", False) and not kind.READ_TOWER:
                raise ValueError(
                    f"The image tower's keep_cls goes with a connector that attends to all its tokens, which "
                    f"{self.connector['kind']!r} doesn't."
                )
            given = {k: v for k, v in self.connector.items() if k != "kind"}
            given = {"dtype": self.dtype, "lora": self.lora, **given}
            made["connector"] = kind(width=llm.width, **given, name="connector", **kw)
        return {**made, "llm": llm}

    def _make(self, part, arguments, kw):
        """The part "img" or "llm"; the config overrides `arguments`."""
        family = parts.family(part, getattr(self, f"{part}_model"))
        variant = {"variant": family.DEFAULT_VARIANT} if family.DEFAULT_VARIANT else {}
        return family.Model(**{**variant, **arguments, **getattr(self, part)}, name=part, **kw)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """{"img": tower, "connector" if there is one, "llm": language model}: modules without parameters, for
        their sizes and leaves."""
        return self._make_parts(parent=None)

    @property
    def leaves(self) -> dict[str, leaves.Leaf]:
        """{"img/head/kernel": `leaves.Leaf`, …}: all parameters, without adapters, in the order of
        the computation."""
        return leaves.join(**{name: part.leaves for name, part in self.parts.items()})

    @property
    def vocab_size(self) -> int:
        """Size of the language model's vocabulary."""
        return self.parts["llm"].vocab_size

    def embed_image(self, image, train=False, capture_attention=False) -> tuple[jax.Array, dict]:
        """float[B, height, width, 3] in [-1, 1] → (float[B, Q, D] unscaled, out-dict)."""
        zimg, of_img = self._img(image, train=train, capture_attention=capture_attention)
        out = {f"img/{k}": v for k, v in of_img.items()}
        if self.connector:
            # The connector's attention is small: captured whole, whatever fold the tower has.
            captured = capture_attention is not False
            zimg, of_connector = self._connector(zimg, train=train, capture_attention=captured)
            out |= {f"connector/{k}": v for k, v in of_connector.items()}
        return zimg, {"img/zimg": zimg, **out}

    def embed_text(self, tokens, train=False) -> tuple[jax.Array, dict]:
        """int32[B, T] → (float[B, T, D] scaled by sqrt(D), out-dict)."""
        ztxt = self._llm.embed_tokens(tokens)
        return ztxt, {"llm/ztxt": ztxt}

    def embed_image_and_text(
        self,
        image,
        text,
        *,
        input_mask=None,
        mask_ar=None,
        zimg=None,
        image_at=None,
        train=False,
        capture_attention=False,
    ) -> tuple[tuple, dict]:
        """Image tokens and text as one embedded sequence; by default the image is in front.

        Args:
          image: float[B, height, width, 3] in [-1, 1].
          text: int32[B, T].
          input_mask: bool[B, T], False on padding; by default all text is valid.
          mask_ar: int32[B, T] as in `splice.make_attn_mask`; by default all text is causal.
          zimg: float[B, Q, D] from `embed_image`, instead of `image`.
          image_at: int32[B] in 0…T, how many text tokens are before the image.
          train: switches dropout on.

        Returns:
          ((x float[B, S, D], input_mask bool[B, S], mask_ar int32[B, S]), out-dict).
        """
        x, _, masks, out = self._splice(
            image, text, input_mask, mask_ar, zimg, image_at, train=train, capture_attention=capture_attention
        )
        return (x, *masks), out

    def _splice(self, image, text, input_mask, mask_ar, zimg, image_at, *, train, capture_attention):
        """(float[B, S, D], `splice.Layout`, (input_mask bool[B, S], mask_ar int32[B, S]), out-dict)."""
        out_img = {}
        if zimg is None:
            zimg, out_img = self.embed_image(image, train, capture_attention)
        ztxt, out_txt = self.embed_text(text, train)
        if input_mask is None:
            input_mask = jnp.ones(text.shape, bool)
        if mask_ar is None:
            mask_ar = jnp.ones(text.shape, jnp.int32)
        x, layout = splice.splice(zimg, ztxt, image_at=image_at, image_ar=self.image_ar)
        return x, layout, layout.masks(input_mask, mask_ar), {**out_img, **out_txt}

    def __call__(
        self,
        image,
        text,
        mask_ar,
        train=False,
        *,
        image_at=None,
        logit_positions=None,
        pre_logits=False,
        capture_attention=False,
    ):
        """Logits for text, given the image and the preceding text.

        Args:
          image: float[B, height, width, 3] in [-1, 1].
          text: int32[B, T].
          mask_ar: int32[B, T], 0 on the prompt (bidirectional), 1 on the answer (causal).
          train: switches dropout on (needs a "dropout" rng).
          image_at: int32[B], how many text tokens are before the image; by default none.
          logit_positions: int32[B, P] text positions to compute logits at; by default all. Training only
            needs the supervised ones, and T × V floats are a step's largest array.
          pre_logits: return float[B, T or P, D], the input of `compute_logits`, instead of logits: for a
            loss that computes few of them at a time.
          capture_attention: add "img/attn" float32[layers, B, heads, patches, patches] and
            "llm/attn" float32[layers, B, heads, S, S] to the out-dict, and what a connector captures as
            "connector/…". A fold (see `layers.capture`) adds (last state, stacked outs) instead; a pair
            sets the image tower's and the language model's, each False, True or a fold.

        Returns:
          (float32[B, T or P, V] logits, out-dict). Logits at t predict the text's token at t + 1; if the
          image is between the two, they are those after the image.

        To differentiate with respect to the probabilities, pass `apply` the collection of `perturbations`.
        """
        of_img, of_llm = (
            capture_attention if isinstance(capture_attention, tuple) else (capture_attention, capture_attention)
        )
        x, layout, masks, out = self._splice(
            image, text, None, mask_ar, None, image_at, train=train, capture_attention=of_img
        )
        out["attn_mask"] = mask = splice.make_attn_mask(*masks)
        if self._llm.attn_impl == "cudnn" and layout.first:
            mask = splice.split_mask(mask, layout.first)
        y, probs = self._llm(x, mask, train=train, capture_attention=of_llm)
        out["llm/pre_logits"] = y
        if of_llm is not False:
            out["llm/attn"] = probs
        of_text = layout.outputs(y, logit_positions)
        return (of_text if pre_logits else self._llm.compute_logits(of_text)), out

    def compute_logits(self, pre_logits) -> jax.Array:
        """float[B, P, D] from the call with `pre_logits` → float32[B, P, V]."""
        return self._llm.compute_logits(pre_logits)

    def prefill_cache(self, x, input_mask, mask_ar, *, cache_size, num_samples=1) -> jax.Array:
        """Reads prompts from `embed_image_and_text`; see `decoder._Model.prefill_cache`."""
        mask = splice.make_attn_mask(input_mask, mask_ar)
        return self._llm.prefill_cache(x, input_mask, mask, cache_size=cache_size, num_samples=num_samples)

    def extend_cache(self, x) -> jax.Array:
        """One step for every sample: float[B·samples, 1, D] → logits float32[B·samples, 1, V]."""
        return self._llm.extend_cache(x)


def _frozen(value):
    if hasattr(value, "items"):
        return FrozenDict({k: _frozen(v) for k, v in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def perturbations(model: Model, *, img=None, llm=None, connector=None) -> dict:
    """The collection of arrays that are added to the attention's probabilities of all layers.

    Zeros change nothing; the gradient with respect to them is that with respect to the probabilities:

        model.apply({"params": params, "perturbations": perturbations(model, llm=zeros)}, …)

    Args:
      img: float32[layers, B, heads, patches, patches], or None. Without the axis of heads, gradients are
        weighted and fused (`capture.weigh`).
      llm: float32[layers, B, heads, S, S], likewise, or None. A class token is one of the patches here.
      connector: {module: array}, with keys and shapes as of `connector.slots`.
    """
    arrays = {name: x for name, x in dict(img=img, llm=llm).items() if x is not None}
    arrays = {f"{name}/{model.parts[name].probs_path}": x for name, x in arrays.items()}
    arrays |= {f"connector/{name}/probs": x for name, x in (connector or {}).items()}
    return leaves.unflatten_tree(arrays)


def patch_grid(model: Model, image) -> tuple[int, int]:
    """(rows, columns) of patches of float[…, height, width, 3]."""
    return model.parts["img"].grid(*image.shape[-3:-1])


def image_size(table: dict[str, leaves.Leaf], params) -> int:
    """Side in pixels of the square images that parameters were made for.

    Args:
      table: the model's table of leaves.
      params: {name: array, or anything with its shape}, at least those of the image tower.
    """
    tower = {leaf.role: leaf for leaf in table.values() if leaf.path.startswith("img/")}
    count, side = (
        params[leaf.path].shape[leaf.axes.index(letter)]
        for leaf, letter in ((tower["positions"], "T"), (tower["patch"], "Y"))
    )
    halvings = sum(leaf.role == "stem" and leaf.path in params for leaf in table.values())
    return math.isqrt(count) * side * 2**halvings


def num_image_tokens(model, image) -> int:
    """Q, how many tokens the language model reads for each image float[…, height, width, 3]."""
    rows, columns = patch_grid(model, image)
    return connectors.tokens(model.connector, rows * columns)


def layout_of(model, batch) -> splice.Layout:
    """The `splice.Layout` of a batch with image […, height, width, 3], text [B, T] and perhaps image_at
    int32[B]."""
    num_image = num_image_tokens(model, batch["image"])
    return splice.Layout(num_image, batch["text"].shape[-1], batch.get("image_at"), model.image_ar)


def init_params(model: Model, rng, *, image_size: int) -> dict:
    """Random parameters in float32: {"img": …, "llm": …} for square images of `image_size` px."""
    image = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
    text = jnp.zeros((1, 2), jnp.int32)
    return model.init(rng, image, text, text)["params"]


def abstract_params(model: Model, *, image_size: int) -> dict:
    """The tree of `init_params` as jax.ShapeDtypeStruct; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0), image_size=image_size))
