"""The driver of Chromium sees what it is there to see: events, complaints, and requests."""

import io

import PIL.Image
import pytest

from tests import chromium

PAGE = """<!doctype html><meta charset="utf-8"><title>a</title>
<style>body { margin: 0 } @media (prefers-color-scheme: dark) { body { background: black } }</style>
<button id="b" style="width: 80px; height: 40px">press</button><input id="i"><p id="p"></p>
<div id="d" style="width: 200px; height: 100px"></div>
<a id="a" download="x.csv" href="data:text/csv,1%2C2">save</a>
<script>
  const log = t => { p.textContent += t + ";" };
  b.onclick = e => log("click" + e.isTrusted + e.shiftKey);
  i.onkeydown = e => log(e.key);
  i.oninput = e => log("i" + i.value);
  d.onpointermove = e => { if (e.buttons) log("move" + Math.round(e.offsetX)); };
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chromium")
    (folder / "page.html").write_text(PAGE, encoding="utf-8")
    with chromium.browser(folder) as page:
        page.path = folder / "page.html"
        yield page


@chromium.needed
def test_events_are_real(page, tmp_path):
    page.open(page.path)
    page.click("#b")
    page.click("#b", shift=True)
    page.click("#i")
    page.key("ArrowLeft")
    page.write("ü")
    assert page.focused() == "input#i"
    x, y, *_ = page.box("#d")
    page.drag([(x + 10, y + 10), (x + 50, y + 10), (x + 90, y + 20)])
    expected = "clicktruefalse;clicktruetrue;ArrowLeft;iü;move50;move90;"
    assert page.text("#p") == expected
    page.emulate(dark=True)
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(0, 0, 0)"
    page.emulate()
    page.screenshot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page.downloads()
    page.click("#a")
    assert page.downloaded() == ("x.csv", b"1,2")
    assert page.problems == [] and page.outside == []


@chromium.needed
def test_complaints_and_requests_are_noticed(page, tmp_path):
    policy = (
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
        "<meta charset=utf-8><script>document.title = 'ran'</script>"
    )
    (tmp_path / "b.html").write_text(policy)
    page.open(tmp_path / "b.html")
    assert page.js("document.title") != "ran"
    page.wait("true")
    assert any("Content Security Policy" in p for p in page.problems)
    (tmp_path / "c.html").write_text(
        "<meta charset=utf-8><script>console.error('oh'); setTimeout(() => nothing.here, 0);"
        "fetch('https://example.org/x').catch(() => 0)</script>"
    )
    page.open(tmp_path / "c.html")
    page.js("new Promise(r => setTimeout(r, 100))")
    assert any("oh" in p for p in page.problems)
    assert any("nothing is not defined" in p for p in page.problems)
    assert page.outside == ["https://example.org/x"]
    with pytest.raises(RuntimeError, match="no element"):
        page.click("#missing")


@chromium.needed
def test_sandboxed_frames_are_looked_into(page, tmp_path):
    (tmp_path / "inner.html").write_text(
        "<meta charset=utf-8><title>inner</title><body style='margin: 0; background: #00f'><p>within</p>"
        "<script>console.error('oh'); fetch('https://example.org/x').catch(() => 0)</script>"
    )
    frame = '<iframe sandbox="allow-scripts" src="inner.html" style="border: 0; width: 100%; height: 300px"></iframe>'
    (tmp_path / "outer.html").write_text(
        f"<meta charset=utf-8><body style='margin: 0'><p style='height: 2000px'></p>{frame}"
    )
    page.open(tmp_path / "outer.html")
    with page.inside("iframe"):
        assert page.text("body") == "within" and page.js("document.title + origin") == "innernull"
        page.js("new Promise(r => setTimeout(r, 100))")
    assert page.text("body") != "within"
    assert any("oh" in p for p in page.problems) and page.outside == ["https://example.org/x"]
    png = page.screenshot()  # though it lies outside of the window
    assert PIL.Image.open(io.BytesIO(png)).convert("RGB").getpixel((600, 2300)) == (0, 0, 255)
    assert page.js("innerHeight") == 900


def test_without_chromium(monkeypatch):
    monkeypatch.setenv("PALIGEMMA_MED_CHROMIUM", "/no/such/program")
    assert chromium.find() is None
