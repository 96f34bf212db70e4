"""Rollout of transformers' `output_attentions` as a side of a benchmark; see `workers`."""

import torch

from tools.bench import peers_hf, sizes, workers


def rollout(attentions) -> torch.Tensor:
    """R of (float[1, N, S, S], …), the mean over heads, each layer (A + I) / 2: float32[S, S]."""
    rolled = None
    for probs in attentions:
        mixed = probs[0].float().mean(dim=0)
        eye = torch.eye(len(mixed), device=mixed.device)
        mixed = (mixed / mixed.sum(dim=-1, keepdim=True) + eye) / 2
        rolled = mixed if rolled is None else mixed @ rolled
    return rolled


def build(settings) -> peers_hf.TorchSide:
    """See `workers`. settings: size, dtype, weights (a folder), cores."""
    size = sizes.SIZES[settings["size"]]
    model = peers_hf.load(settings, attn_implementation="eager").eval()
    inputs = peers_hf.arrange(model, sizes.draw_batch(size, 1))
    # The last token is predicted, not read.
    inputs = {k: x[:, :-1] if k != "pixel_values" else x for k, x in inputs.items()}
    ids, labels = inputs["input_ids"][0], inputs.pop("labels")[0]
    at = torch.nonzero(labels != -100)[:, 0] - 1
    # The composite only returns the language model's attentions; the tower's come from its layers.
    of_image = []
    for module in model.modules():
        if type(module).__name__ == "SiglipAttention":
            module.register_forward_hook(lambda m, args, out: of_image.append(out[1]))

    def step():
        of_image.clear()
        with torch.inference_mode():
            out = model(**inputs, output_attentions=True)
            logprobs = torch.log_softmax(out.logits[0, at].float(), dim=-1)
            logprobs = logprobs.gather(1, ids[at + 1][:, None])[:, 0]
            return rollout(out.attentions)[at].cpu(), rollout(of_image).cpu(), logprobs.cpu()

    side = peers_hf.TorchSide(step, settings["dtype"], {})
    side.value = lambda found: float(found[2].sum())

    def result():
        rows, image, logprobs = step()
        return dict(rollout=rows.tolist(), image_rollout=image[:8].tolist(), logprobs=logprobs.tolist())

    side.result = result
    return side


if __name__ == "__main__":
    workers.serve(peers_hf.device, build)
