"""transformers and peft as a side of a benchmark: the training step that most people would write.

`PaliGemmaForConditionalGeneration` with scaled-dot-product attention, peft's LoRA on top, the loss
that the model gives for `labels`, and `torch.optim.AdamW`: each at its defaults. The model's table
loses the 64 rows that Hugging Face adds to it, so that the softmax is over the same vocabulary.
"""

import peft
import torch
import transformers

from tools.bench import sizes, workers


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def device():
    """The device that PyTorch computes on, named as JAX names it."""
    if _device() == "cuda":
        torch.zeros(1, device="cuda")  # the context is part of no side
        return dict(platform="gpu", device=torch.cuda.get_device_name())
    return dict(platform="cpu", device="cpu")


class _Side:
    """See `workers`."""

    def __init__(self, model, trained, inputs, dtype):
        self.about = dict(
            torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__,
            trained=sum(p.numel() for p in trained),
        )  # fmt: skip
        self._model, self._inputs, self._dtype = model, inputs, dtype
        self._optimizer = torch.optim.AdamW(
            trained, lr=sizes.LEARNING_RATE, weight_decay=sizes.WEIGHT_DECAY
        )
        self._matrices = {}

    def step(self):
        self._optimizer.zero_grad()
        loss = self._model(**self._inputs).loss
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def value(self, loss):
        if _device() == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def multiply(self, n):
        if n not in self._matrices:
            pair = (torch.randn(n, n, device=_device(), dtype=self._dtype) for _ in range(2))
            self._matrices = {n: tuple(pair)}
        a, b = self._matrices[n]
        (a @ b)[0, 0].item()

    def peak(self):
        return torch.cuda.max_memory_allocated() if _device() == "cuda" else None


def build(settings):
    """See `workers`. settings: size, dtype, what, weights (a folder), rows, cores."""
    size, what, dtype = settings["size"], settings["what"], getattr(torch, settings["dtype"])
    size, where = sizes.SIZES[size], _device()
    if settings.get("cores"):
        torch.set_num_threads(settings["cores"])
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        f"{settings['weights']}/base", dtype=dtype, attn_implementation="sdpa", device_map=where
    )
    vocab = size.llm["vocab_size"]
    # The image's token is one of the rows that go; one beyond `vocab_size` is no row to look up.
    model.resize_token_embeddings(vocab)
    model.model.vocab_size = vocab
    if what == "lora":
        model = peft.PeftModel.from_pretrained(
            model, f"{settings['weights']}/adapter", is_trainable=True
        )
    else:
        model.requires_grad_(what == "full")
        model.get_submodule("model.multi_modal_projector").requires_grad_(True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = sizes.draw_batch(size, settings["rows"])
    image_token, patches = model.config.image_token_id, model.config.text_config.num_image_tokens
    text, answer = (torch.tensor(batch[k], dtype=torch.long) for k in ("text", "mask_loss"))
    ids = torch.nn.functional.pad(text, (patches, 0), value=image_token)
    answer = torch.nn.functional.pad(answer, (patches, 0))
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=answer,
        labels=torch.where(answer > 0, ids, -100),
        pixel_values=torch.tensor(batch["image"].transpose(0, 3, 1, 2)).to(dtype),
    )
    return _Side(model, trained, {k: x.to(where) for k, x in inputs.items()}, dtype)


if __name__ == "__main__":
    workers.serve(device, build)
