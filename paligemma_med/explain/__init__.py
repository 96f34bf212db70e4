"""An answer about an image and what it rests on, as a page to work with.

`python -m paligemma_med.explain --help` shows the options; docs/explain.md says how to read the page.
"""

from paligemma_med.explain.answer import Loaded, check, explain, fit_mask, load, piece
from paligemma_med.explain.files import slug, write_npz, write_page, write_pngs
from paligemma_med.explain.many import explain_many, worst_first
from paligemma_med.explain.questions import Asked, about_images, images_in, read_mask, read_questions

__all__ = [
    "Asked",
    "Loaded",
    "about_images",
    "check",
    "explain",
    "explain_many",
    "fit_mask",
    "images_in",
    "load",
    "piece",
    "read_mask",
    "read_questions",
    "slug",
    "worst_first",
    "write_npz",
    "write_page",
    "write_pngs",
]
