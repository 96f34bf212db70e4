"""Boxes that an answer has: in the page's text, and drawn where they are, in the browser."""

import pytest

from paligemma_med.explain import page
from tests import chromium
from tests.explain import reports

A, B = "<loc0102><loc0102><loc0409><loc0512>", "<loc0512><loc0767><loc0921><loc1023>"


def test_boxes_stand_in_the_page():
    text = page.render(reports.fake(answer=f"{A} liver ; {B} left lung"))
    assert "<b>1</b> <bdi>liver</bdi>" in text and "(from the left 75 to 100 %, from above 50 to 90 %)" in text
    assert "Not a box" not in text
    made = page.data_of(reports.fake(answer=f"Left {B}"))
    assert made["boxes"] == [[pytest.approx(x / 1023) for x in (512, 767, 921, 1023)]]


def test_what_is_no_box_is_said_and_not_drawn():
    text = page.render(reports.fake(answer=f"<loc0001> {reports.HOSTILE} ; {A} liver"))
    assert "Not a box, and not drawn: <code>&lt;loc0001&gt;" in text and "<b>1</b> <bdi>liver</bdi>" in text
    assert "<img src=x" not in text
    assert "Boxes in the answer" not in page.render(reports.fake(answer="liver"))


@chromium.needed
def test_boxes_are_drawn_where_they_are(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("boxes"), width=1300, height=950) as browser:
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_text(page.render(reports.fake(answer=f"{A} liver ; {B} left lung")), encoding="utf-8")
        browser.open(path)
        script = """(() => {
          const c = document.getElementById("map"), g = c.getContext("2d");
          const is = (y, x) => {  // the boxes' colour within 3 pixels
            const p = g.getImageData(Math.round(x * c.width) - 3, Math.round(y * c.height) - 3, 7, 7).data;
            for (let i = 0; i < p.length; i += 4) if (p[i] < 9 && p[i + 1] > 220 && p[i + 2] > 240) return 1;
            return 0;
          };
          return [[0.3, 0.1], [0.3, 0.5], [0.1, 0.3], [0.4, 0.3], [0.7, 0.75], [0.9, 0.85], [0.3, 0.7], [0.8, 0.3]]
            .map(([y, x]) => is(y, x)).join("");
        })()"""
        assert browser.js(script) == "11111100"
