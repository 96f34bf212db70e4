"""A question and its answer as one sequence of tokens, and where each part is in it."""

import dataclasses

import numpy as np

from paligemma_med.saliency import trace


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One image, prompt and answer.

    Attributes:
      batch: image float32[1, H, W, 3], text int32[1, T], mask_ar int32[1, T] (1 after the prompt),
        mask_input int32[1, T] (1 on prompt and answer), and image_at int32[1] if the image isn't in
        front.
      grid: (rows, columns) of patches.
      prompt: slice of a map's columns (see `trace`).
      response: slice of a map's columns, those of the answer's tokens.
      queries: int32[R] positions of the sequence that predict them.
      least: rows that programs are made for, at least, whatever R is (`trace.padded`).
    """

    batch: dict
    grid: tuple[int, int]
    prompt: slice
    response: slice
    queries: np.ndarray
    least: int = 0

    @property
    def patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    @property
    def places(self) -> np.ndarray:
        """int[R] tokens of the text after which the model predicts the answer's."""
        return np.arange(self.response.start, self.response.stop) - self.patches - 1

    @property
    def tokens(self) -> np.ndarray:
        """The answer's tokens, int32[R]."""
        return self.batch["text"][0, self.places + 1]


def prompt_of(row) -> dict:
    """`make`'s arguments from a preprocessed row: the prompt without padding, and where the image is."""
    valid = np.asarray(row["mask_input"]) > 0
    return dict(
        prompt_ids=np.asarray(row["text"])[valid],
        mask_ar=np.asarray(row["mask_ar"])[valid],
        image_at=row.get("image_at"),
    )


def ended(answer_ids, stop_tokens) -> np.ndarray:
    """int32[…] an answer as `decode.generate` returns it, up to and with its first stop token; what follows that is
    padding, and an answer without one has none."""
    answer = np.asarray(answer_ids, np.int32).reshape(-1)
    ends = np.flatnonzero(np.isin(answer, stop_tokens))
    return answer[: ends[0] + 1] if ends.size else answer


def make(model, prompt_ids, answer_ids, image, *, mask_ar=0, image_at=None, pad_to=None, least=0) -> Sequence:
    """Puts a prompt and an answer into one sequence.

    Args:
      model: `vlm.Model`, which knows where everything stands.
      prompt_ids: int[…] the prompt's tokens, without padding; there may be none.
      answer_ids: int[…] the answer's tokens without padding (`ended`); what ends it is one of them.
      image: float[H, W, 3] in [-1, 1].
      mask_ar: of the prompt, an int or int[…] for each token: 0 where it is bidirectional, 1 where
        it is causal; see `splice.make_attn_mask`.
      image_at: how many of the prompt's tokens come before the image; None: the image is in front.
      pad_to: T. By default the next multiple of 16, so that few programs are compiled.
      least: of the `Sequence`.

    Raises:
      ValueError: no answer, an image that isn't [H, W, 3] or that lies outside the prompt,
        text longer than `pad_to`.
    """
    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image has shape {image.shape}; expected [height, width, 3].")
    prompt, answer = (np.asarray(x, np.int32).reshape(-1) for x in (prompt_ids, answer_ids))
    if not answer.size:
        raise ValueError("The answer has no tokens; expected at least one.")
    if not prompt.size and image_at is None:
        image_at = 0  # the same place, but said, so that there are logits after the image
    if image_at is not None and not 0 <= image_at <= prompt.size:
        raise ValueError(f"image_at is {image_at}; expected 0 to {prompt.size}, the length of the prompt.")
    length = prompt.size + answer.size
    pad_to = -(-length // 16) * 16 if pad_to is None else pad_to
    if length > pad_to:
        raise ValueError(f"Prompt and answer are {length} tokens; pad_to={pad_to} is less.")
    text, ar = np.zeros((1, pad_to), np.int32), np.ones((1, pad_to), np.int32)
    text[0, :length] = np.concatenate([prompt, answer])
    ar[0, : prompt.size] = mask_ar
    valid = np.arange(pad_to)[None] < length
    batch = dict(image=image[None], text=text, mask_ar=ar, mask_input=valid.astype(np.int32))
    if image_at is not None:
        batch["image_at"] = np.array([image_at], np.int32)
    example = trace.of(model, batch)
    middle, end = example.patches + prompt.size, example.patches + length
    return Sequence(
        batch=batch,
        grid=example.grid,
        prompt=slice(example.patches, middle),
        response=slice(middle, end),
        queries=example.layout.query(np.arange(prompt.size, length)[None])[0].astype(np.int32),
        least=least,
    )
