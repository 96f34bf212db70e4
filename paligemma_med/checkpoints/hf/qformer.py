"""The query transformer in BLIP-2's names (transformers, models/blip_2/modeling_blip_2.py), and the layer after it.

Two of its layers are one of ours: those with even numbers also attend to the image.
"""

from collections.abc import Iterator

from paligemma_med.checkpoints.hf.layout import Row, dense, norm

_KINDS = {"self": "attention", "cross": "crossattention"}
# Learned, but of the text that it read in BLIP-2's first stage.
TEXT = (
    r"qformer\.embeddings\.(word_embeddings|position_embeddings)\..*",
    r"qformer\.embeddings\.position_ids",
    r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    r"qformer\.cls\..*",
)
QUERIES, FIRST = "query_tokens", "qformer.encoder.layer.0.attention.attention.query.weight"
PROJECTION = "projection"


def rows() -> Iterator[Row]:
    """The rows of the query transformer, its queries and the projection among them."""
    yield Row(QUERIES, "1 Q W", "connector/queries")
    yield from _norm("qformer.layernorm", "connector/input_norm")
    for block in (0, 1):
        for row in _block_rows("qformer.encoder.layer.{i}", f"connector/layers/block_{block}", cross=block == 0):
            yield row._replace(numbering=(block, 2))
    yield from projection_rows()


def projection_rows(*, hidden: bool = False) -> Iterator[Row]:
    """The rows of what leads into the language model, one linear layer or two."""
    if hidden:
        yield from dense(f"{PROJECTION}.0", "connector/hidden")
        yield from dense(f"{PROJECTION}.2", "connector/proj")
    else:
        yield from dense(PROJECTION, "connector/proj")


def _block_rows(at, ours, *, cross):
    for kind in ("self", "cross")[: 1 + cross]:
        theirs = f"{at}.{_KINDS[kind]}"
        for name in ("query", "key", "value"):
            yield from dense(f"{theirs}.attention.{name}", f"{ours}/{kind}/{name}")
        yield from dense(f"{theirs}.output.dense", f"{ours}/{kind}/out")
        yield from _norm(f"{theirs}.output.LayerNorm", f"{ours}/{kind}_norm")
    yield from dense(f"{at}.intermediate_query.dense", f"{ours}/mlp/Dense_0")
    yield from dense(f"{at}.output_query.dense", f"{ours}/mlp/Dense_1")
    yield from _norm(f"{at}.output_query.LayerNorm", f"{ours}/mlp_norm")


def _norm(name, folder):
    return (row._replace(theirs="W") for row in norm(name, folder, bias=True))
