"""The page to ask on in Chromium: everything by keyboard, on a phone's width, and what its frame shows. The server is
the real one; behind it, in place of the model, stands a desk of ready answers."""

import io
import os
import threading
import types

import numpy as np
import PIL.Image
import pytest

from paligemma_med import page as pages
from paligemma_med.explain import page, serve
from paligemma_med.pp import images
from tests import chromium
from tests.explain import reports

pytestmark = chromium.needed
SCREENSHOTS = os.environ.get("PALIGEMMA_MED_SCREENSHOTS")  # a folder to look into, see CONTRIBUTING.md


class Desk:
    """What the server asks of `asking.Desk`, without a model."""

    has_turns, keep, doing = True, None, "answering"
    loaded = types.SimpleNamespace(weights="ready answers")

    def __init__(self):
        self.asked, self.answers = [], {}

    def add_image(self, content, name):
        found = images.decode(content)
        height, width = found.rgb.shape[:2]
        shown = dict(name=pages.clean(name), width=width, height=height, picture=page.data_url(found.rgb))
        return dict(id="7", notes=list(found.notes), **shown)

    def ask(self, image, question, history):
        if "nothing" in question:
            raise ValueError("this question can't be asked")
        self.asked.append((image, question, history))
        number = str(len(self.asked))
        self.answers[number] = question
        return dict(
            id=number,
            question=question,
            image="film.png",
            answer="left lung",
            probability="45 %",
            tokens=[["left", "90 %"], [" lung", "70 %"], ["‹end›", "50 %"]],
            ended=True,
            blank="liver",
            blank_probability="20 %",
            same=False,
            turns_read=len(self.asked) - 1 if history else 0,
            turns_left_out=0,
            tokens_cut=0,
        )

    def report(self, number):
        del number

    def html(self, number):
        return page.render(reports.fake(question=self.answers[number]))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask")
    examples = []
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (60 + 10 * i, 80, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        examples.append((f"film {i}.png", str(folder / f"{i}.png")))
    with serve.Server(0, examples) as server:
        server.desk = Desk()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(opened, server, request):
    """A browser with the page open. After the test: nothing was complained about, nothing asked for elsewhere."""
    server.desk = Desk()
    opened.emulate()
    opened.resize(1280, 900)
    opened.open(server.address)
    yield opened
    if opened.count("iframe"):
        with opened.inside("iframe"):  # loaded, so that its complaints belong to this test
            pass
    if SCREENSHOTS:
        opened.screenshot(os.path.join(SCREENSHOTS, f"{request.node.name}.png"))
    assert opened.problems == []
    assert [x for x in opened.requests if not x.startswith((server.address, "data:"))] == []


def open_example(browser):
    browser.click("#examples button")
    browser.wait("document.activeElement.id == 'question'")


def ask(browser, question, until="!document.getElementById('go').ariaDisabled"):
    before = browser.count("article")
    browser.js("document.getElementById('question').select()")
    browser.write(question)
    browser.key("Enter")
    browser.wait(f"document.querySelectorAll('article').length > {before} && {until}")


def colours(browser, selector):
    """How many colours are to be seen where an element is."""
    x, y, width, height = browser.box(selector)
    found = PIL.Image.open(io.BytesIO(browser.screenshot(whole=False))).convert("RGB")
    box = (max(0, x + 5), max(0, y + 5), min(found.width, x + width - 5), min(found.height, y + height - 5))
    return len(found.crop(tuple(map(round, box))).getcolors(2**24))


def assert_frame_shows(browser, question, width):
    """The saliency page is in the frame, works there, and is painted: not merely loaded."""
    with browser.inside("article iframe"):
        assert question in browser.text("body") and "left lung" in browser.text("body")
        before = browser.js("document.getElementById('map').toDataURL()")
        browser.js("document.querySelector('.chip').click()")
        assert browser.js("document.getElementById('map').toDataURL()") != before
        assert browser.js("document.documentElement.scrollWidth") <= width
        assert browser.js("origin") == "null"  # so that nothing in it could ask the server
    for _ in range(50):  # the picture of another process comes when it comes
        if (seen := colours(browser, "article iframe")) > 100:
            break
    assert seen > 100


def test_the_frame_shows_the_saliency_page(browser, server):
    open_example(browser)
    ask(browser, "Which organ is it?")
    assert "Answer: left lung, probability 45 %" in browser.text("#status")
    assert browser.text(".blank") == "Without the image (mid-grey in its place): liver (probability 20 %)"
    assert browser.count("article .chip") == 3
    assert_frame_shows(browser, "Which organ is it?", 1280)
    address = browser.js("document.querySelector('article .page a').href")
    asked = list(browser.requests)
    browser.open(address)  # the page by itself
    assert "Which organ is it?" in browser.text("body") and browser.js("origin") == "null"
    browser.requests += asked


def test_by_keyboard_alone(browser, server):
    browser.key("Tab")
    assert browser.focused() == "input#file"
    browser.key("Tab")
    browser.key("ArrowDown")
    assert browser.focused() == "select#example" and browser.js("document.getElementById('example').value") == "1"
    browser.key("Tab")
    browser.key("Enter")
    browser.wait("document.activeElement.id == 'question'")
    assert "film 1.png, 80 × 70 pixels" in browser.text("#caption")
    browser.write("Which organ?")
    browser.key("Tab")
    browser.key("Tab")
    browser.key(" ")  # no saliency page yet
    browser.key("Tab", shift=True)
    assert browser.focused() == "button#go.plain.main"
    browser.key("Enter")
    browser.wait("document.querySelector('article')")
    browser.wait("document.getElementById('status').textContent.startsWith('Answer')")
    assert browser.count("iframe") == 0
    for _ in range(10):
        browser.key("Tab")
        if "measure" in browser.focused():
            break
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.key("Enter")
    browser.wait("document.querySelector('iframe')")
    assert server.desk.asked == [("7", "Which organ?", False)]
    live = "[...document.querySelectorAll('[role=status], [role=alert]')].map(e => e.id)"
    assert browser.js(live) == ["status", "error"]


def test_on_a_phone(browser):
    browser.resize(360, 740)
    open_example(browser)
    ask(browser, "Which of the organs that are to be seen here is abnormal?")
    assert browser.js("document.documentElement.scrollWidth") <= 360
    assert_frame_shows(browser, "Which of the organs", 360)
    small = """[...document.querySelectorAll('button, select, input[type=text], input[type=file]')]
      .map(e => [e.getBoundingClientRect().height, e.outerHTML.slice(0, 60)]).filter(([h]) => h < 24)"""
    assert browser.js(small) == []  # WCAG 2.2, 2.5.8


def test_a_dialogue(browser, server):
    open_example(browser)
    browser.click("#saliency")
    ask(browser, "Is it a CT?")
    browser.click("#history")
    ask(browser, "And where?")
    ask(browser, "And why?")
    assert [history for *_, history in server.desk.asked] == [False, True, True]
    kickers = browser.js("[...document.querySelectorAll('article .kicker')].map(e => e.textContent)")
    assert kickers == [
        "3 · film.png · with 2 earlier turns",
        "2 · film.png · with 1 earlier turn",
        "1 · film.png",
    ]  # the newest first
    assert browser.js("document.querySelectorAll('article .thumb')[2].naturalHeight") == 60


def test_what_goes_wrong_is_told_in_the_page(browser, server):
    browser.js("document.getElementById('question').focus()")
    browser.write("Which organ?")
    browser.key("Enter")
    assert browser.text("#status") == "Open an image first."
    file = "new File(['no image'], 'ü <b>.png')"
    browser.js(
        f"(() => {{ const t = new DataTransfer(); t.items.add({file});"
        "document.dispatchEvent(new DragEvent('drop', {dataTransfer: t, cancelable: true})); })()"
    )
    browser.wait("!document.getElementById('error').hidden")
    assert browser.text("#error").startswith("Not a readable image")
    open_example(browser)
    assert not browser.js("document.getElementById('error').checkVisibility()")
    browser.js("document.getElementById('question').select()")
    browser.write("nothing")
    browser.key("Enter")
    browser.wait("!document.getElementById('error').hidden")
    assert browser.text("#error") == "This question can't be asked."
    assert len(browser.problems) == 2 and all("400 (Bad Request)" in x for x in browser.problems)
    browser.problems.clear()


def test_names_and_contrast(browser):
    open_example(browser)
    ask(browser, "Which organ?")
    for dark in (False, True):
        browser.emulate(dark=dark)
        assert browser.js(chromium.LOW_CONTRAST) == []
    assert browser.js(chromium.NAMELESS) == []
