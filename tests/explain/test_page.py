"""The page: what is in the file, and what it does in a browser under real clicks and keys."""

import re

import numpy as np
import pytest

from paligemma_med.explain import page
from paligemma_med.saliency import raw, report
from tests import chromium
from tests.explain import reports

P, W = 48, 8  # of reports.fake


# --- Without a browser ---


@pytest.mark.parametrize("kind, bound", [("f2", 2.0**-11), ("u1", 0.004)])
def test_packed_arrays_come_back(kind, bound):
    rng = np.random.default_rng(0)
    x = (rng.random((3, 4, 50)) ** 6 * 10.0 ** rng.integers(-20, 20, (3, 4, 1))).astype(np.float32)
    x[0, 0] = 0
    error = np.abs(page.unpack(page.pack(x, kind)) - x).max(-1)
    assert (error <= bound * x.max(-1)).all()
    signed = rng.normal(size=(2, 5)).astype(np.float32)
    np.testing.assert_allclose(page.unpack(page.pack(signed)), signed, atol=2e-3)
    with pytest.raises(ValueError, match="aren.t negative"):
        page.pack(signed, "u1")


def test_raw_attention_of_many_patches_is_kept_small():
    """448 px, the shapes of the 3B model: 18 layers of 8 heads, 1,024 patches."""
    made = reports.fake(grid=(32, 32), layers=18, heads=8)
    assert made.raw.size > page.MAX_RAW
    text = page.render(made)
    assert "8 bits on a square-root scale" in text
    assert len(text) < 2_000_000
    assert "8 bits" not in page.render(reports.fake())


def test_figures_and_texts_stand_in_the_page_without_its_script():
    text = page.render(reports.fake())
    for words in (
        "Which organ is abnormal?",
        "left lung",
        "film.png",
        "Image ignored",
        "Not for diagnosis",
        "never the answer",
        "2 of 3 sampled answers",
    ):
        assert words in text
    # 0.9 · 0.7 · 0.5
    assert "with probability 32\u00a0%" in text
    assert "<td>2</td>" in text  # times of the sample


@pytest.mark.parametrize(
    "answer, said", [("", "(nothing)"), (" \n", "(white space alone: &#39; \\n&#39;)"), ("no", "no")]
)
def test_an_answer_that_cannot_be_seen_is_described(answer, said):
    made = reports.fake(answer=answer, samples=[], controls=[])
    assert f"The model answers: <b><bdi>{said}</bdi>" in page.render(made)


def test_hostile_texts_are_inert_in_the_file():
    bad = reports.HOSTILE
    made = reports.fake(
        title=bad,
        question=bad,
        answer=bad,
        given=bad,
        prompt=[bad] * 5,
        tokens=[bad] * 3,
        others=[[(bad, 0.5)]] * 3,
        about=[(bad, bad)],
        flags=[dict(name=bad, says=bad)],
        samples=[dict(answer=bad, logprob=-1.0)],
        controls=[dict(name=bad, answer=bad, logprob=-1.0)],
        mask=report.Masked("blur", np.zeros((8, 8, 3), np.uint8), -np.ones(3), bad),
    )
    for text in (page.render(made), page.render_index(index_rows(bad), bad)):
        assert "<script>document" not in text and "<img src=x" not in text
        assert text.count("<script") == (2 if "application/json" in text else 1)
        assert "\x00" not in text and "\x1b" not in text
        text.encode()  # no half of a surrogate pair
        assert re.search(r'http-equiv="Content-Security-Policy" content="default-src', text)


def index_rows(text="film.png"):
    row = dict(
        name=text, question=text, answer=text, given=text, probability=0.2, thumb=None, href=None, error=None, flags=[]
    )
    flag = dict(name="Image ignored", says=text)
    thumb = page.data_url(np.full((20, 10, 3), 7, np.uint8), 96)
    return [
        {**row, "error": text, "probability": None},
        {**row, "flags": [flag], "href": "0002_film.html", "thumb": thumb},
        {**row, "probability": 0.00001, "question": "Something else"},
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(raw=np.zeros((3, 2, 3, 55))), r"raw has shape \(3, 2, 3, 55\); expected .* 56\)"),
        (dict(logprobs=np.zeros(4)), "logprobs has shape"),
        (dict(logprobs=np.full(3, np.nan)), "logprobs holds NaN"),
        (dict(maps=[report.Map("x", "", np.zeros((3, P)))]), "a map is of 'x'"),
        (
            dict(maps=[report.Map("rollout", "a", np.zeros((3, 5)))]),
            "the map rollout a has shape",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        page.render(reports.fake(**change))


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"jinja2, which is not installed: pip install"):
        page.render(reports.fake())


def test_overlay():
    picture = np.full((6, 9, 3), 100, np.uint8)
    values = np.zeros((2, 3))
    values[1, 2] = 4.0
    out = page.overlay(picture, values, opacity=1.0)
    assert out.shape == picture.shape and out.dtype == np.uint8
    assert (out[:3] == 100).all() and (out[3:, :6] == 100).all()  # 0 is transparent
    assert (out[3:, 6:] == page.colour_stops("viridis")[-1]).all()
    # Half the scale: half-way along the colours, opaque by the root of a half.
    half = page.overlay(picture, values, opacity=1.0, top=8.0)[5, 8]
    stops = page.colour_stops("viridis")
    want = np.sqrt(0.5) * stops[len(stops) // 2] + (1 - np.sqrt(0.5)) * 100
    np.testing.assert_allclose(half, want, atol=1)
    signed = page.overlay(picture, values - 2.0, opacity=1.0)
    assert tuple(signed[0, 0]) == tuple(page.colour_stops("signed")[0])
    # Of one method all maps have the same colours, those without a negative value too.
    signed = page.overlay(picture, values, opacity=1.0, signed=True)
    assert tuple(signed[5, 8]) == tuple(page.colour_stops("signed")[-1])


def test_probabilities_as_text():
    assert [page.share(p) for p in (1.0, 0.934, 0.1, 0.0512, 0.0004, 0.00001)] == [
        s.replace(" ", "\u00a0", 1) if s[0] != "b" else "below 0.01\u00a0%"
        for s in ("100 %", "93 %", "10 %", "5.1 %", "0.04 %", "b")
    ]
    # What isn't certain isn't written as if; rounding may lift a log-probability to 0 and above.
    assert [page.share(p) for p in (0.9949, 0.9951, 0.99949, 0.99951)] == [
        s.replace(" %", "\u00a0%") for s in ("99 %", "99.5 %", "99.9 %", "over 99.9 %")
    ]
    assert page.percent(1e-6) == page.percent(0) == "over 99.9\u00a0%"


# --- In Chromium ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("page"), width=1300, height=950) as opened:
        yield opened


@pytest.fixture
def shown(browser, tmp_path):
    """(page opened in the browser, its report)."""
    made = reports.fake()
    (tmp_path / "report.html").write_text(page.render(made), encoding="utf-8")
    browser.emulate()
    browser.resize(1300, 950)
    browser.open(tmp_path / "report.html")
    yield browser, made
    assert browser.problems == []
    assert browser.outside == []


def map_pixels(browser):
    return browser.js("document.getElementById('map').toDataURL()")


def values_of(made, method, variant="", r=None):
    """float[P]: the map that the page should show."""
    (m,) = [m for m in made.maps if (m.method, m.variant) == (method, variant)]
    x = m.values[:, :P]
    return x[r] if r is not None else page.whole(method, x[:-1])  # without the end


def peak(values):
    return f"row {values.argmax() // W + 1}, column {values.argmax() % W + 1} "


@chromium.needed
def test_a_token_is_clicked(shown):
    browser, made = shown
    whole = map_pixels(browser)
    assert "The whole answer by relevancy through" in browser.text("#message")
    assert peak(values_of(made, "relevancy_siglip")) in browser.text("#message")
    seen = {whole}
    for r, token in enumerate(made.tokens):
        browser.click(f"#tokens .chip:nth-child({r + 1})")
        message = browser.text("#message")
        assert f"“{token.strip()}” by" in message
        assert peak(values_of(made, "relevancy_siglip", r=r)) in message
        assert browser.count("#tokens [aria-pressed=true]") == 1
        seen.add(map_pixels(browser))
    assert len(seen) == 4
    browser.click("#all")
    assert map_pixels(browser) == whole


@chromium.needed
def test_every_method_and_setting_shows_its_own_map(shown):
    browser, made = shown
    seen = set()
    for m in made.maps:
        browser.set("#method", m.method)
        if m.variant:
            browser.set("#variant", m.variant)
        assert peak(values_of(made, m.method, m.variant)) in browser.text("#message")
        seen.add(map_pixels(browser))
    browser.set("#method", "raw")
    for layer, head, fuse in [(-1, -1, "mean"), (-1, -1, "max"), (1, -1, "min"), (2, 1, "mean")]:
        for name, value in (("layer", layer), ("head", head), ("fuse", fuse)):
            browser.set(f"#{name}", str(value))
        chosen = [None if i < 0 else i for i in (layer, head)]
        values = raw.raw(made.raw, *chosen, fuse)[:-1, :P].mean(0)
        assert peak(values) in browser.text("#message")
        seen.add(map_pixels(browser))
    assert len(seen) == len(made.maps) + 4
    # What is only looks changes the picture and not the words.
    before = browser.text("#message")
    for name, value in (("colours", "cividis"), ("range", "shared"), ("opacity", "0.3")):
        browser.set(f"#{name}", value)
        seen.add(map_pixels(browser))
    browser.click("#smooth")
    seen.add(map_pixels(browser))
    assert len(seen) == len(made.maps) + 8
    assert browser.text("#message") == before


@chromium.needed
def test_heads_and_methods_are_chosen_by_their_small_maps(shown):
    browser, made = shown
    assert browser.count("#gallery button") == 6
    browser.click("#gallery button[aria-label^='layer 2, head 1']")
    assert browser.js("document.getElementById('method').value") == "raw"
    assert "(layer 2, head 1)" in browser.text("#message")
    assert peak(made.raw[1, 0, :-1, :P].mean(0)) in browser.text("#message")
    share = made.mass[1, 0, :-1, 0].mean()
    label = browser.js("document.querySelector('#gallery [aria-pressed=true]').ariaLabel")
    assert f"{100 * share:.0f} % on the image" in label
    browser.click("#overview button:nth-child(2)")
    assert "by attention rollout (mean of heads)" in browser.text("#message")


@chromium.needed
def test_a_patch_is_clicked_and_a_region_brushed(shown):
    browser, made = shown
    browser.set("#method", "rollout")
    browser.click("#stage", at=((5 + 0.5) / 8, (2 + 0.5) / 6))
    values = made.maps[0].values
    figures = "[...document.querySelectorAll('#tokens .figure')].map(e => e.textContent)"

    def expected(patches):
        found = raw.image_to_response(values, patches)
        return [page.share(float(x)) for x in found]

    assert browser.js(figures) == expected([2 * W + 5])
    (drops,) = [m.values for m in made.maps if m.method == "occlusion"]
    drop = drops[:, 2 * W + 5].sum()  # of the answer, its end included
    now = made.logprobs.sum()
    text = browser.text("#whatif")
    assert "With row 3, column 6 replaced" in text
    assert f"goes from {page.percent(now)} to {page.percent(now - drop)}" in text
    assert browser.count("#whatif-table tbody tr") == 3

    x, y, width, height = browser.box("#stage")
    corner = [(x + (c + 0.5) / 8 * width, y + (r + 0.5) / 6 * height) for r, c in ((1, 2), (4, 4))]
    browser.drag([corner[0], ((corner[0][0] + corner[1][0]) / 2, corner[0][1]), corner[1]])
    rectangle = [r * W + c for r in range(1, 5) for c in range(2, 5)]
    assert browser.js(figures) == expected(rectangle)
    assert "12 chosen patches" in browser.text("#message")
    # The smallest rectangle of the coarse grid around it: rows end at 0 2 3 4 6, columns at 0 2 4…
    boxes = made.regions.boxes.tolist()
    want = made.regions.logprobs[boxes.index([0, 2, 6, 6])].sum()
    text = browser.text("#whatif")
    assert "With rows 1 to 6, columns 3 to 6 replaced" in text
    assert f"to {page.percent(want)} " in text


@chromium.needed
def test_a_prompt_token_is_clicked(shown):
    browser, made = shown
    browser.set("#method", "rollout")
    browser.click("#prompt .chip:nth-child(2)")
    assert "the prompt’s “Is”" in browser.text("#message")
    shares = raw.image_to_response(made.maps[0].values, [P + 1])
    figures = browser.js("[...document.querySelectorAll('#tokens .figure')].map(e=>e.textContent)")
    assert figures == [page.share(float(x)) for x in shares]
    # Occlusion knows nothing of the prompt: back to the tokens.
    browser.set("#method", "occlusion")
    assert browser.js("document.querySelector('[name=direction]:checked').value") == "token"


@chromium.needed
def test_keys_alone_suffice(shown):
    browser, made = shown
    browser.js("document.getElementById('stage').focus()")
    at = made.grid[0] // 2 * W + W // 2
    browser.key("ArrowUp")
    browser.key("ArrowRight")
    at += 1 - W
    assert f"With row {at // W + 1}, column {at % W + 1} replaced" in browser.text("#whatif")
    browser.key("ArrowDown", shift=True)
    assert "2 chosen patches" in browser.text("#message")
    browser.key("Escape")
    assert browser.text("#whatif").startswith("Choose a patch")
    for _ in range(20):
        browser.key("Tab")
        if "chip" in browser.focused():
            break
    assert "chip" in browser.focused()
    outline = browser.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.key("ArrowRight")
    assert "“lung” by" in browser.text("#message")
    browser.key("ArrowRight", shift=True)
    assert "“lung” “‹end›” by" in browser.text("#message")
    browser.key("Home")
    assert "“left” by" in browser.text("#message")
    assert browser.js("document.getElementById('message').getAttribute('aria-live')") == "polite"


@chromium.needed
def test_everything_has_a_name_and_contrast_holds_in_light_and_dark(shown):
    browser, _ = shown
    assert browser.js(chromium.NAMELESS) == []
    for dark in (False, True):
        browser.emulate(dark=dark)
        assert browser.js(chromium.LOW_CONTRAST) == []
    browser.emulate(media="print")
    assert not browser.js("document.getElementById('save').checkVisibility()")
    browser.emulate()
    browser.resize(380, 800)
    assert browser.js("document.documentElement.scrollWidth") <= 380


@chromium.needed
def test_the_view_is_saved(shown):
    browser, _ = shown
    browser.downloads()
    browser.click("#save")
    name, content = browser.downloaded()
    assert name == "saliency_relevancy_siglip.png" and content.startswith(b"\x89PNG")


@chromium.needed
def test_hostile_texts_are_inert_in_the_browser(browser, tmp_path):
    bad = reports.HOSTILE
    made = reports.fake(
        title=bad,
        question=bad,
        answer=bad,
        prompt=[bad] * 5,
        tokens=[bad] * 3,
        others=[[(bad, 0.5)]] * 3,
        about=[(bad, bad)],
        flags=[dict(name=bad, says=bad)],
        samples=[dict(answer=bad, logprob=-1.0)],
    )
    texts = dict(report=page.render(made), index=page.render_index(index_rows(bad), bad))
    for name, text in texts.items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        browser.open(tmp_path / f"{name}.html")
        assert "owned" not in browser.js("document.title").split("'")[0:1]
        assert browser.js("document.title").endswith("saliency report" if name == "report" else "saliency reports")
        assert browser.count("img[src=x]") == 0
        assert "</script><script>" in browser.text("h1" if name == "report" else "td:nth-child(2)")
        if name == "report":
            browser.click("#tokens .chip:nth-child(2)")
            browser.click("#prompt .chip:nth-child(2)")
            browser.click("#stage")
            assert browser.text("#tokens .piece").startswith("</script><script>")
        assert browser.problems == [] and browser.outside == []


@chromium.needed
def test_the_policy_stops_what_would_run(browser, tmp_path):
    """Were a text not escaped, the content policy would still keep it from running."""
    text = page.render(reports.fake())
    inject = (
        "<script>document.title='owned'</script>"
        "<img src='https://example.org/x.png' onerror=\"document.title='owned'\">"
    )
    (tmp_path / "bad.html").write_text(text.replace("<main>", inject + "<main>"), "utf-8")
    browser.open(tmp_path / "bad.html")
    assert "owned" not in browser.js("document.title")
    assert any("Content Security Policy" in p for p in browser.problems)
    assert "by relevancy" in browser.text("#message")  # the page itself works


@chromium.needed
def test_the_index_filters(browser, tmp_path):
    (tmp_path / "index.html").write_text(page.render_index(index_rows(), "3 answers"), "utf-8")
    browser.open(tmp_path / "index.html")
    visible = "[...document.querySelectorAll('#rows tr')].filter(r => !r.hidden).length"
    assert browser.js(visible) == 3
    assert browser.js("document.querySelector('#rows a').getAttribute('href')") == "0002_film.html"
    browser.set("#flag", "Image ignored")
    assert browser.js(visible) == 1 and browser.text("#count") == "1 of 3 answers"
    browser.set("#flag", "")
    browser.set("#words", "something ELSE")
    assert browser.js(visible) == 1
    assert browser.problems == [] and browser.outside == []
