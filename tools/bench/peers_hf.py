"""transformers and peft as a side of a benchmark: the training step that most people would write.

`PaliGemmaForConditionalGeneration` with scaled-dot-product attention, peft's LoRA on top, the model's
loss for `labels`, and `torch.optim.AdamW`, each with its defaults. The 64 rows that Hugging Face adds to
the embedding table are removed, so that the softmax is over the same vocabulary.
"""

import peft
import torch
import transformers

from tools.bench import sizes, workers


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def device() -> dict:
    """The device that PyTorch computes on, named as JAX names it."""
    if _device() == "cuda":
        torch.zeros(1, device="cuda")  # creates the context, which counts for no side
        return dict(platform="gpu", device=torch.cuda.get_device_name())
    return dict(platform="cpu", device="cpu")


class TorchSide:
    """The base of PyTorch sides; see `workers`. next_step: () → a number, on the device."""

    def __init__(self, next_step, dtype, about):
        versions = dict(torch=torch.__version__, transformers=transformers.__version__)
        self.step, self.about = next_step, {**versions, **about}
        self._dtype, self._matrices = getattr(torch, dtype), {}

    def value(self, x) -> float:
        if _device() == "cuda":
            torch.cuda.synchronize()
        return x.item()

    def multiply(self, n) -> None:
        if n not in self._matrices:
            pair = (torch.randn(n, n, device=_device(), dtype=self._dtype) for _ in range(2))
            self._matrices = {n: tuple(pair)}
        a, b = self._matrices[n]
        (a @ b)[0, 0].item()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if _device() == "cuda" else None


def load(settings, attn_implementation="sdpa") -> torch.nn.Module:
    """The model of the benchmark's folder, on the device, without adapters."""
    size = sizes.SIZES[settings["size"]]
    if settings.get("cores"):
        torch.set_num_threads(settings["cores"])
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        f"{settings['weights']}/base",
        dtype=getattr(torch, settings["dtype"]),
        attn_implementation=attn_implementation,
        device_map=_device(),
    )
    vocab = size.llm["vocab_size"]
    # The image token is among the removed rows; an id beyond `vocab_size` is never looked up.
    model.resize_token_embeddings(vocab)
    model.model.vocab_size = vocab
    return model


def arrange(model, batch) -> dict:
    """The batch of `sizes.draw_batch` in the model's form: image, then text without padding."""
    image_token, patches = model.config.image_token_id, model.config.text_config.num_image_tokens
    text, answer = (torch.tensor(batch[k], dtype=torch.long) for k in ("text", "mask_loss"))
    ids = torch.nn.functional.pad(text, (patches, 0), value=image_token)
    answer = torch.nn.functional.pad(answer, (patches, 0))
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=answer,
        labels=torch.where(answer > 0, ids, -100),
        pixel_values=torch.tensor(batch["image"].transpose(0, 3, 1, 2)).to(model.dtype),
    )
    return {k: x.to(model.device) for k, x in inputs.items()}


def build(settings) -> TorchSide:
    """See `workers`. settings: size, dtype, what, weights (a folder), rows, cores."""
    what, model = settings["what"], load(settings)
    inputs = arrange(model, sizes.draw_batch(sizes.SIZES[settings["size"]], settings["rows"]))
    if what == "lora":
        model = peft.PeftModel.from_pretrained(model, f"{settings['weights']}/adapter", is_trainable=True)
    else:
        model.requires_grad_(what == "full")
        model.get_submodule("model.multi_modal_projector").requires_grad_(True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=sizes.LEARNING_RATE, weight_decay=sizes.WEIGHT_DECAY)

    def step():
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    about = dict(peft=peft.__version__, trained=sum(p.numel() for p in trained))
    return TorchSide(step, settings["dtype"], about)


if __name__ == "__main__":
    workers.serve(device, build)
