"""transformers' `generate` as a side of a benchmark; see `workers`.

One call for all questions, padded on the left to the longest prompt, with `num_return_sequences` answers
to each, as in its documentation. Cache and attention (scaled dot products) are its defaults.
"""

import numpy as np
import torch

from tools.bench import peers_hf, sizes, workers


def build(settings) -> peers_hf.TorchSide:
    """See `workers`. settings: size, dtype, weights (a folder), rows (questions), samples, tokens,
    cores."""
    size = sizes.SIZES[settings["size"]]
    model = peers_hf.load(settings).eval()
    inputs = arrange(model, sizes.draw_prompts(size, settings["rows"]))
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    inputs = {k: x.to(model.device) for k, x in inputs.items()}
    width = inputs["input_ids"].shape[1]
    calls = 0

    def call(**drawing):
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                max_new_tokens=settings["tokens"],
                eos_token_id=None,
                pad_token_id=0,
                **drawing,
            )
        return out[:, width:]

    def step():
        nonlocal calls
        calls += 1
        torch.manual_seed(calls)
        return call(do_sample=True, num_return_sequences=settings["samples"], temperature=1.0, top_k=0, top_p=1.0)

    side = peers_hf.TorchSide(step, settings["dtype"], {})
    side.value = lambda found: float(found.cpu().numpy().size)
    side.result = lambda: call(do_sample=False).cpu().tolist()
    return side


def arrange(model, batch) -> dict:
    """The batch of `sizes.draw_prompts` in the model's form: padding, image, prompt."""
    image_token, patches = model.config.image_token_id, model.config.text_config.num_image_tokens
    lengths = batch["mask_input"].sum(axis=1)
    width = patches + lengths.max()
    ids, mask = np.zeros((2, len(lengths), width), np.int64)
    for i, n in enumerate(lengths):
        ids[i, width - n :], mask[i, width - n - patches :] = batch["text"][i, :n], 1
        ids[i, width - n - patches : width - n] = image_token
    return dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        token_type_ids=torch.zeros(ids.shape, dtype=torch.long),
        pixel_values=torch.tensor(batch["image"].transpose(0, 3, 1, 2)),
    )


if __name__ == "__main__":
    workers.serve(peers_hf.device, build)
