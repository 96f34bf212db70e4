"""A report of made-up arrays, in which everything is as it must be: rows that sum to 1, tokens that
see no later ones."""

import numpy as np

from paligemma_med.saliency import raw, report
from paligemma_med.saliency.methods import KINDS
from paligemma_med.saliency.passes import ROLLOUTS

PROMPT = ["‹start›", "Is", " it", "?", "↵"]
TOKENS = ["left", " lung", "‹end›"]
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "&lt;b&gt; \u202eevil\u202c {{ 7*7 }} ]]> <!-- \x00\x1b[31m \ud800 javascript:alert(1) '\"`${1}"
)


def fake(*, grid=(6, 8), layers=3, heads=2, tokens=TOKENS, prompt=PROMPT, seed=0, **kw):
    """A report of random arrays, changed by `kw`."""
    rng = np.random.default_rng(seed)
    patches, r = grid[0] * grid[1], len(tokens)
    s = patches + len(prompt) + r
    seen = np.arange(s) < patches + len(prompt) + np.arange(r)[:, None]

    def rows(*shape):
        x = rng.random((*shape, r, s)) ** 8 * seen
        return (x / x.sum(-1, keepdims=True)).astype(np.float32)

    drops = rng.normal(0, 0.5, (r, patches)).astype(np.float32)
    maps = [report.Map("rollout", v, rows()) for v in ROLLOUTS]
    maps += [report.Map("rollout_siglip", v, rows()) for v in ROLLOUTS]
    maps += [report.Map(m, "", rows()) for m in ("relevancy", "relevancy_siglip")]
    maps += [report.Map("occlusion", "", drops)]
    made = rows(layers, heads)
    boxes = report.boxes(grid)
    out = dict(
        title="film.png",
        question="Which organ is abnormal?",
        answer="left lung",
        prompt=list(prompt),
        tokens=list(tokens),
        ended=tokens[-1] == "‹end›",
        rivals=(np.zeros((r, 2), np.int32), np.zeros((r, 2), np.float32)),
        logprobs=np.log(np.linspace(0.9, 0.5, r)).astype(np.float32),
        others=[[(t, 0.6), ("right", 0.3)] for t in tokens],
        picture=rng.integers(0, 256, (90, 120, 3), np.uint8),
        seen=rng.integers(0, 256, (96, 128, 3), np.uint8),
        grid=grid,
        raw=made,
        mass=raw.mass(made, patches, slice(patches, patches + len(prompt))),
        maps=maps,
        occlusion=dict(fill="blur", cell=1),
        regions=report.Regions(fill="blur", boxes=boxes, logprobs=-rng.random((len(boxes), r)).astype(np.float32)),
        samples=[dict(answer=a, logprob=-1.0) for a in ("left lung", "left lung", "liver")],
        controls=[dict(name="Nothing (mid-grey)", answer="left lung", logprob=-0.7)],
        mask=None,
        flags=[dict(name="Image ignored", says="It hardly depends on the image.")],
        about=[("Weights", "none")],
    )
    assert {m.method for m in maps} | {"raw"} == set(KINDS)
    return report.Report(**{**out, **kw})
