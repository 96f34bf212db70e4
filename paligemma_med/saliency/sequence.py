"""A question with its answer as one sequence of tokens, and where its parts are in it."""

import dataclasses

import numpy as np

from paligemma_med.models import vlm

PAD_TOKEN = 0


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One image, prompt and answer; positions are in 0…S − 1, the image's patches first.

    Attributes:
      batch: image float32[1, H, W, 3], text int32[1, T], mask_ar int32[1, T] (0 on the prompt, 1
        after), mask_input int32[1, T] (1 on prompt and answer).
      grid: (rows, columns) of patches.
      prompt: slice of positions.
      response: slice of positions of the answer's tokens.
      queries: int32[R] positions that predict them.
    """

    batch: dict
    grid: tuple[int, int]
    prompt: slice
    response: slice
    queries: np.ndarray

    @property
    def patches(self):
        """P."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self):
        """The answer's tokens, int32[R]."""
        return self.batch["text"][0, self.response.start - self.patches :][: len(self.queries)]


def make(model, prompt_ids, answer_ids, image, *, pad_to=None):
    """Puts a prompt and an answer, as `decode.generate` reads and writes them, into one sequence.

    Args:
      model: `vlm.Model`, of which the patches' size is taken.
      prompt_ids: int[…] the prompt's tokens, without padding.
      answer_ids: int[…] the answer's tokens; padding (0) at the end is dropped, EOS is a token.
      image: float[H, W, 3] in [-1, 1].
      pad_to: T. By default the next multiple of 16, so that few programs are compiled.

    Raises:
      ValueError: no prompt, no answer, an image that isn't [H, W, 3], text longer than `pad_to`.
    """
    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image has shape {image.shape}; expected [height, width, 3].")
    prompt, answer = (np.asarray(x, np.int32).reshape(-1) for x in (prompt_ids, answer_ids))
    answer = answer[: np.max(np.flatnonzero(answer != PAD_TOKEN), initial=-1) + 1]
    for name, x in (("prompt", prompt), ("answer", answer)):
        if not x.size:
            raise ValueError(f"The {name} has no tokens; expected at least one.")
    length = prompt.size + answer.size
    pad_to = -(-length // 16) * 16 if pad_to is None else pad_to
    if length > pad_to:
        raise ValueError(f"Prompt and answer are {length} tokens; pad_to={pad_to} is less.")
    text = np.zeros((1, pad_to), np.int32)
    text[0, :length] = np.concatenate([prompt, answer])
    place = np.arange(pad_to)[None]
    grid = vlm.patch_grid(model, image)
    start = grid[0] * grid[1]
    middle, end = start + prompt.size, start + length
    return Sequence(
        batch=dict(
            image=image[None],
            text=text,
            mask_ar=(place >= prompt.size).astype(np.int32),
            mask_input=(place < length).astype(np.int32),
        ),
        grid=grid,
        prompt=slice(start, middle),
        response=slice(middle, end),
        queries=np.arange(middle - 1, end - 1, dtype=np.int32),
    )
