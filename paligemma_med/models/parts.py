"""The parts that a model is made of, by the names that configs give them, and what each must offer.

big_vision's keys name a family: `model.img_model` an image tower, `model.llm_model` a language
model. A family is a module. What a part of it has as parameters stands in its table of leaves.
"""

from paligemma_med.models import decoder, leaves, vit

# Every leaf that a part of these families may have. For code that has parameters and no model, such
# as the conversion of checkpoints; a model tells its own (`leaves`).
LEAVES = leaves.join(img=vit.LEAVES, llm=decoder.LEAVES)
