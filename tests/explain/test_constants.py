"""What of a map is on learned constants: in the page and its words, in the arrays, and nowhere if there are none."""

import dataclasses
import re

import numpy as np
import pytest

from paligemma_med.explain import answer, files, page
from tests import chromium
from tests.explain import reports

RNG = np.random.default_rng(0)
RAW = RNG.uniform(0.05, 0.3, (3, 2, 3)).astype(np.float32)
SHARES = {"rollout": [0.1, 0.2, 0.9], "rollout_siglip": [0.3, 0.4, 0.9]}


def made(**kw):
    out = reports.fake(raw_constants=RAW, causal=True, **kw)
    maps = [m._replace(constants=np.float32(SHARES[m.method])) if m.method in SHARES else m for m in out.maps]
    return dataclasses.replace(out, maps=maps)


def test_arrays(tmp_path):
    files.write_npz(made(), tmp_path / "a.npz")
    files.write_npz(reports.fake(), tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        np.testing.assert_array_equal(a["raw_on_constants"], RAW)
        np.testing.assert_array_equal(a["rollout_mean_of_heads_on_constants"], np.float32(SHARES["rollout"]))
        ends = "_on_constants"
        assert sum(k.endswith(ends) for k in a) == 9 and not any(k.endswith(ends) for k in b)


def test_a_row_in_the_page_tells_them():
    """The mean over the answer's tokens, of which the end isn't one."""
    raw = page.share(RAW.mean((0, 1))[:2].mean())
    said = f"raw attention {raw}, attention rollout 15 %, rollout through the image tower 35 %"
    assert answer._on_constants(made()).replace("\u00a0", " ") == said.replace("\u00a0", " ")
    assert answer._on_constants(reports.fake()) == ""


def test_what_a_causal_model_can_say():
    texts = [re.sub(r"\s+", " ", page.render(x)) for x in (made(), reports.fake())]
    for text, causal in zip(texts, (True, False)):
        assert "never see" in text or "never the answer" in text
        assert ("sees only what stands before it" in text) == causal
        assert ("see each other in both directions" in text) != causal


def test_constants_of_another_shape_are_refused():
    maps = [m._replace(constants=np.zeros(2)) for m in reports.fake().maps[:1]]
    with pytest.raises(ValueError, match=r"rollout mean of heads has constants of shape \(2,\); expected \(3,\)"):
        page.render(reports.fake(maps=maps))
    with pytest.raises(ValueError, match=r"raw_constants has shape \(3, 2\)"):
        page.render(reports.fake(raw_constants=np.zeros((3, 2))))


@chromium.needed
def test_the_page_says_it_of_what_is_shown(tmp_path):
    report = made()
    (tmp_path / "report.html").write_text(page.render(report), encoding="utf-8")

    def expected(constants, values):
        share = constants / values[:, :48].sum(-1).mean()
        return f"{page.share(share)} of what falls on the image ends on learned constants"

    values = {m.method: m.values[:2] for m in reversed(report.maps)}
    with chromium.browser(tmp_path / "profile", width=1300, height=950) as browser:
        browser.open(tmp_path / "report.html")
        for method, want in (("rollout", 0.15), ("rollout_siglip", 0.35)):
            browser.set("#method", method)
            assert expected(want, values[method]) in browser.text("#message")
        browser.set("#method", "relevancy")
        assert "constants" not in browser.text("#message")
        browser.set("#method", "raw")
        browser.set("#layer", "1")
        browser.set("#head", "0")
        assert expected(RAW[1, 0, :2].mean(), report.raw[1, 0, :2]) in browser.text("#message")
        browser.set("#head", "-1")
        browser.set("#fuse", "max")
        assert "constants" not in browser.text("#message")
        assert browser.problems == []
