"""Models by their published names: arguments of `vlm.Model`.

PaliGemma is arXiv 2407.07726, PaliGemma 2 arXiv 2412.03555, MedGemma arXiv 2507.05201. The first is the default model.
llama_clip is arXiv 2504.05575, bloom_qformer arXiv 2404.16192 and pefomed arXiv 2401.02797. The former two have no
released code: which layer of the tower they read, what lies between, and the number of queries are our choice.
"""

_TOWER = dict(variant="So400m/14")
_ROWS = 257_152  # 256,000 pieces of Gemma's tokenizer, then 1,024 <loc> and 128 <seg> tokens

PRESETS = {
    "paligemma_3b": dict(img=_TOWER, llm=dict(variant="gemma_2b", vocab_size=_ROWS)),
    "paligemma2_3b": dict(img=_TOWER, llm=dict(variant="gemma2_2b", vocab_size=_ROWS)),
    "paligemma2_10b": dict(img=_TOWER, llm=dict(variant="gemma2_9b", vocab_size=_ROWS)),
    "paligemma2_28b": dict(img=_TOWER, llm=dict(variant="gemma2_27b", vocab_size=_ROWS)),
    "medgemma_4b": dict(
        img=_TOWER,
        connector=dict(kind="projector", reduce="pool", factor=4, norm=True, bias=False),
        image_ar="block",
        llm=dict(variant="gemma3_4b"),
    ),
    # LLaVA-Med's features: the last layer but one, without a norm and without the class token.
    "llama_clip": dict(
        img=dict(variant="biomedclip_b/16", depth=11, final_norm=None),
        image_ar="causal",
        llm=dict(variant="llama3_8b"),
    ),
    # BLIP-2's: all tokens after the last norm, and a BERT-base of 32 queries.
    "bloom_qformer": dict(
        img=dict(variant="biomedclip_b/16", keep_cls=True),
        connector=dict(kind="qformer", queries=32),
        image_ar="causal",
        llm=dict(variant="bloom_7b1"),
    ),
    "pefomed": dict(
        img=dict(variant="eva_g/14"),
        connector=dict(kind="projector", reduce="group", factor=4),
        image_ar="causal",
        llm=dict(variant="llama2_7b"),
    ),
}
DEFAULT = PRESETS["paligemma_3b"]
