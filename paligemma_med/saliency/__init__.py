"""What in the image and the question an answer rests on, as arrays.

Attention of one teacher-forced pass (`capture`), read as it is (`raw`), followed through the layers
(`rollout`), or weighted by gradients (`relevancy`); occlusion as a check that uses no attention.
Functions take and return arrays, and know no files.

Symbols, in all files here: P image patches, row by row; T text tokens, prompt and answer and padding;
Q image tokens that the language model reads; S = Q + T positions of its sequence; R tokens of the
answer; L layers, N heads of the language model. A *map* has P + T columns (`trace`). The *query* of
an answer's token is the position that predicts it, the one before.

In a prefix-LM, patches and prompt see each other in both directions but never the answer. So no
attention says which tokens a patch influences; the answer's attention to the patch, read the other way,
stands in for it (`raw.image_to_response`).
"""
