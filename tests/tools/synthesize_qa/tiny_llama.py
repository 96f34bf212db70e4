"""A random LLaMA of a few thousand weights that nevertheless says question-answer pairs.

Some of its tokens are whole lines ("Q: …", "A: …"), and only those have weights in its head: what
it draws reads as pairs, as half a pair, or as nothing, depending on all of its prompt.
"""

import pathlib

import tokenizers
import torch
import transformers

from tools.synthesize_qa import templates

CHAT = """{% for m in messages %}<|start|>{{ m['role'] }}
{{ m['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
LINES = (
    "Q: Is the lung clear?\n",
    "A: Yes\n",
    "Q: Which plane is shown?\n",
    "A: Axial\n",
    "A: No\n",
    "Q: What is seen in the liver?\n",
    "A: A cyst\n",
    "Well.\n",
    "\n",
    "Q: Where is the mass?\n",
)


def save(folder, chat=CHAT, seed=0, scale=6.0, limit=8192, **config):
    """Writes model and tokenizer as `save_pretrained` does; returns the folder."""
    texts = [p.read_text("utf-8") for p in sorted(templates.FOLDER.glob("*.txt"))]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, initial_alphabet=sorted(alphabet), show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(["<|start|>", "<|end|>"])
    made.add_tokens(list(LINES))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = chat
    torch.manual_seed(seed)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = transformers.LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": limit,
            "tie_word_embeddings": False,
            "eos_token_id": end,
            "bos_token_id": None,
            "initializer_range": 0.3,
            **config,
        }
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        said = [end, *tokenizer.convert_tokens_to_ids(list(LINES))]
        head = torch.zeros_like(model.lm_head.weight)
        head[said] = scale * torch.randn(len(said), config.hidden_size) / config.hidden_size**0.5
        model.lm_head.weight.copy_(head)
    folder = pathlib.Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def captions(path, n):
    """A JSONL file of n made-up captions of several lengths; returns its path."""
    words = "liver lung kidney spine mass cyst axial coronal enhancing large small left right".split()
    with open(path, "w") as f:
        for i in range(n):
            text = " ".join(words[(i * k + k) % len(words)] for k in range(3, 4 + i % 9))
            f.write(f'{{"image_id": "img{i:03}", "caption": "An image shows {text}."}}\n')
    return path
