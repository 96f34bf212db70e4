"""Models by their published names: arguments of `vlm.Model`.

PaliGemma is arXiv 2407.07726, PaliGemma 2 arXiv 2412.03555. The first is the default model.
"""

_TOWER = dict(variant="So400m/14")
_ROWS = 257_152  # 256,000 pieces of Gemma's tokenizer, then 1,024 <loc> and 128 <seg> tokens

PRESETS = {
    "paligemma_3b": dict(img=_TOWER, llm=dict(variant="gemma_2b", vocab_size=_ROWS)),
    "paligemma2_3b": dict(img=_TOWER, llm=dict(variant="gemma2_2b", vocab_size=_ROWS)),
    "paligemma2_10b": dict(img=_TOWER, llm=dict(variant="gemma2_9b", vocab_size=_ROWS)),
    "paligemma2_28b": dict(img=_TOWER, llm=dict(variant="gemma2_27b", vocab_size=_ROWS)),
}
DEFAULT = PRESETS["paligemma_3b"]
