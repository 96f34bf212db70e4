"""The page to ask on in Chromium: everything by keyboard, on a phone's width, and what its frame shows. The server is
the real one; behind it, in place of the model, stands a desk of ready answers."""

import io
import os
import threading
import types

import numpy as np
import PIL.Image
import pytest

from paligemma_med.explain import asking, page, serve
from paligemma_med.pp import images, windows
from tests import chromium
from tests.explain import reports
from tests.pp import dicom_files

pytestmark = chromium.needed
SCREENSHOTS = os.environ.get("PALIGEMMA_MED_SCREENSHOTS")  # a folder to look into, see CONTRIBUTING.md


class Desk(asking.Desk):
    """It opens images, and has answers ready."""

    has_turns = True

    def __init__(self, pp="decode"):
        pp = types.SimpleNamespace(pp=pp)
        super().__init__(types.SimpleNamespace(weights="ready answers", pp=pp))
        self.doing, self.asked, self.answers = "answering", [], {}

    def ask(self, image, question, history):
        if "nothing" in question:
            raise ValueError("this question can't be asked")
        self.asked.append((image, question, history))
        number = str(len(self.asked))
        self.answers[number] = question
        name = self._get(self._images, image, "image").name
        return dict(
            id=number,
            question=question,
            image=name,
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
    assert server.desk.asked == [("1", "Which organ?", False)]
    live = "[...document.querySelectorAll('[role=status], [role=alert]')].map(e => e.id)"
    assert browser.js(live) == ["status", "error"]


def test_on_a_phone(browser):
    browser.resize(360, 740)
    open_example(browser)
    ask(browser, "Which of the organs that are to be seen here is abnormal?")
    assert browser.js("document.documentElement.scrollWidth") <= 360
    assert_frame_shows(browser, "Which of the organs", 360)
    small = """[...document.querySelectorAll('button, select, input[type=text], input[type=file]')]
      .filter(e => e.checkVisibility())
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
        "3 · film 0.png · with 2 earlier turns",
        "2 · film 0.png · with 1 earlier turn",
        "1 · film 0.png",
    ]  # the newest first
    assert browser.js("document.querySelectorAll('article .thumb')[2].naturalHeight") == 60


def test_frames_and_windows_of_a_dicom_file(browser, server, tmp_path):
    hu = np.linspace(-1000, 1000, 64).astype(np.int16).reshape(8, 8)
    ct = dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT", RescaleSlope=1, RescaleIntercept=0)
    content = dicom_files.make(np.stack([hu, hu.T]), PixelRepresentation=1, NumberOfFrames=2, **ct)
    (tmp_path / "ct.dcm").write_bytes(content)
    open_example(browser)
    assert not browser.js("document.getElementById('view').checkVisibility()")
    browser.upload("#file", tmp_path / "ct.dcm")
    browser.wait("document.getElementById('caption').textContent.startsWith('ct.dcm, 8 × 8')")
    assert browser.text("#frames") == "of 2"
    browser.set("#frame", "2")
    browser.set("#window", "lung")
    browser.click("#view button")
    browser.wait("document.getElementById('caption').textContent.startsWith('ct.dcm#frame=2|window=lung')")
    (*_, shown) = server.desk._images.values()
    np.testing.assert_array_equal(shown.pixels, images.decode(content, frame=1, window=windows.parse("lung")).rgb)
    ask(browser, "Which organ?")
    assert browser.text("article .kicker") == "1 · ct.dcm#frame=2|window=lung"
    browser.set("#frame", "3")
    browser.click("#view button")  # held back by the browser
    assert browser.js("document.getElementById('frame').validity.rangeOverflow")
    open_example(browser)
    browser.wait("!document.getElementById('view').checkVisibility()")
    browser.upload("#file", tmp_path / "ct.dcm")  # the same once more, from its first frame
    browser.wait("document.getElementById('view').checkVisibility()")
    assert browser.js("document.getElementById('window').value + document.getElementById('frame').value") == "1"


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
    assert browser.text("#error").startswith("The file ü <b>.png: not a readable image")
    open_example(browser)
    assert not browser.js("document.getElementById('error').checkVisibility()")
    browser.js("document.getElementById('question').select()")
    browser.write("nothing")
    browser.key("Enter")
    browser.wait("!document.getElementById('error').hidden")
    assert browser.text("#error") == "This question can't be asked."
    assert len(browser.problems) == 2 and all("400 (Bad Request)" in x for x in browser.problems)
    browser.problems.clear()


def test_without_dialogues_and_without_a_server(opened, tmp_path):
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "film.png")
    with serve.Server(0) as server:
        server.desk = Desk('window("soft tissue")|decode')
        server.desk.has_turns, server.desk.keep = False, str(tmp_path)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        opened.resize(1280, 900)
        opened.open(server.address)
        assert "the model never reads earlier questions" in opened.text("#alone")
        assert opened.js("document.getElementById('window').options[0].text") == "as in the run’s config: soft tissue"
        assert opened.count("#history") == opened.count("#examples") == 0
        assert "kept in the folder of --keep" in opened.text(".banner")
        opened.upload("#file", tmp_path / "film.png")
        opened.wait("document.activeElement.id == 'question'")
        ask(opened, "Which organ?", "!document.getElementById('go').ariaDisabled")
        assert server.desk.asked == [("1", "Which organ?", False)] and opened.problems == []
        server.shutdown()
    opened.js("document.getElementById('question').focus()")
    opened.key("Enter")
    opened.wait("!document.getElementById('error').hidden")
    assert opened.text("#error") == "The program doesn’t answer: has it ended? Its terminal says more."


def test_names_and_contrast(browser):
    open_example(browser)
    ask(browser, "Which organ?")
    for dark in (False, True):
        browser.emulate(dark=dark)
        assert browser.js(chromium.LOW_CONTRAST) == []
    assert browser.js(chromium.NAMELESS) == []
