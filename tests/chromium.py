"""Headless Chromium for tests of our pages, spoken to over its DevTools protocol.

The protocol runs over a pair of pipes (`--remote-debugging-pipe`): no port, no web socket, nothing
but the standard library. A page's complaints (console errors, exceptions, what its content policy
refused) and the addresses that it asked for are collected, so that a test can say

    with chromium.browser(tmp_path) as page:
        page.open(tmp_path / "report.html")
        page.click("#token-3")
        assert page.js("document.title") == "…"
        assert page.problems == [] and page.outside == []

A sandboxed frame is a process of its own, to which the driver attaches as well; `with page.inside("iframe"):` looks
into it.

Tests carry `@chromium.needed`, which skips them with a reason where there is no Chromium
(Debian: `apt-get install chromium`; PALIGEMMA_MED_CHROMIUM names another binary). No test needs the
network, and host names do not resolve.
"""

import base64
import contextlib
import fcntl
import json
import math
import os
import pathlib
import select
import shutil
import signal
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 60  # s, for anything: eight programs may share two cores
LOCAL = ("file:", "data:", "blob:", "about:")
_FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run
    --no-default-browser-check --disable-extensions --disable-background-networking --disable-sync
    --disable-component-update --disable-default-apps --disable-domain-reliability --mute-audio
    --hide-scrollbars --force-color-profile=srgb --force-device-scale-factor=1
    --enable-features=IsolateSandboxedIframes
    --remote-debugging-pipe
""".split()
_KEYS = {  # name -> (code, virtual key, text)
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    " ": ("Space", 32, " "),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "Home": ("Home", 36, ""),
    "End": ("End", 35, ""),
}
# Expressions for `Page.js`: elements that a screen reader has no name for; texts of less contrast than WCAG asks for.
NAMELESS = """[...document.querySelectorAll('button, select, input, img, iframe, [tabindex="0"]')]
  .filter(e => !(e.alt || e.title || e.ariaLabel || e.textContent.trim() || e.closest('label')
                 || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML)"""
LOW_CONTRAST = """(() => {
  const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4).reduce((t, v, i) => t + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; }
    return 'rgb(255, 255, 255)'; };
  return [...document.querySelectorAll('p, h1, h2, h3, td, th, dt, dd, button, label, li, .figure')]
    .filter(e => e.innerText.trim() && !e.closest('.gallery')).map(e => {
    const a = light(getComputedStyle(e).color), b = light(ground(e));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)]; })
    .filter(([c]) => c < 4.5); })()"""
_SHIFT = 8
_LOADED = "document.readyState == 'complete' && location.href != 'about:blank'"
_HEARD = ("Runtime", "Log", "Network")  # what a page and its frames tell of


def find():
    """Path of a Chromium, or None."""
    if named := os.environ.get("PALIGEMMA_MED_CHROMIUM"):
        return shutil.which(named)
    return next(filter(None, map(shutil.which, NAMES)), None)


needed = pytest.mark.skipif(
    find() is None, reason="no chromium here (apt-get install chromium, or PALIGEMMA_MED_CHROMIUM)"
)


@contextlib.contextmanager
def browser(folder, *, width=1280, height=900):
    """A `Page` in a Chromium of its own, which ends with the block.

    Args:
      folder: takes the profile (removed at the end), the log and downloads, each in its own place.
    """
    folder = pathlib.Path(folder)
    profile = folder / ".chromium"
    profile.mkdir(parents=True, exist_ok=True)
    pid, to, of = _start(profile, f"--window-size={width},{height}", folder / "chromium.log")
    try:
        yield Page(_Pipe(to, of, folder / "chromium.log"), folder, width, height)
    finally:
        os.close(to)
        os.close(of)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # its own group: renderers end with it
        os.waitpid(pid, 0)
        shutil.rmtree(profile, ignore_errors=True)


def _start(profile, size, log):
    """(pid, file to write to, file to read from). Chromium reads at 3 and writes at 4."""
    its_in, to = map(_high, os.pipe())
    of, its_out = map(_high, os.pipe())
    command = [
        find(),
        *_FLAGS,
        size,
        f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "about:blank",
    ]
    env = {k: v for k, v in os.environ.items() if k != "DBUS_SESSION_BUS_ADDRESS"}
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        (os.POSIX_SPAWN_DUP2, its_in, 3),
        (os.POSIX_SPAWN_DUP2, its_out, 4),
    ]
    pid = os.posix_spawn(command[0], command, env, file_actions=actions, setpgroup=0)
    os.close(its_in)
    os.close(its_out)
    return pid, to, of


def _high(fd):
    """The same file at a number that 3 and 4 can't clash with."""
    out = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16)
    os.close(fd)
    return out


class _Pipe:
    """Messages: JSON, each ended by a zero byte."""

    def __init__(self, to, of, log):
        self._to, self._of, self._log = to, of, log
        self._buffer, self._waiting = b"", []

    def send(self, message):
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]

    def receive(self, until):
        """The next message, or None at the time `until`."""
        while not self._waiting:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._of], [], [], left)[0]:
                return None
            data = os.read(self._of, 1 << 20)
            if not data:
                raise RuntimeError(f"chromium ended:\n{self._log.read_text(errors='replace')}")
            *whole, self._buffer = (self._buffer + data).split(b"\0")
            self._waiting += map(json.loads, whole)
        return self._waiting.pop(0)


class Page:
    """One tab. Attributes after `open`, sandboxed frames included:

    problems: str each: console errors and warnings, exceptions, refusals by the content policy.
    requests: all addresses asked for, the page's own first.
    outside: those of them that are no local file, data or blob: what would leave the machine.
    """

    def __init__(self, pipe, folder, width, height):
        self._pipe, self._count, self._session = pipe, 0, None
        self._folder, self._loaded = folder, False
        self.problems, self.requests = [], []
        self._frames = {}  # id of a frame -> session of its process
        targets = self._call("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", *_HEARD):
            self._call(f"{domain}.enable")
        # A frame's process waits until it is listened to, so that nothing is missed (`_heard`).
        self._call("Target.setAutoAttach", in_tab=True, autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        self.resize(width, height)

    # What a test asks for.

    def open(self, path):
        """Opens a file (or an address that has a scheme) and waits until it is loaded."""
        address = str(path)
        if "://" not in address and not address.startswith(LOCAL):
            address = pathlib.Path(path).resolve().as_uri()
        self.problems, self.requests, self._loaded = [], [], False
        said = self._call("Page.navigate", url=address)
        if said.get("errorText"):
            raise RuntimeError(f"{address}: {said['errorText']}")
        self._until(lambda: self._loaded, f"{address} to load")

    @property
    def outside(self):
        return [url for url in self.requests if not url.startswith(LOCAL)]

    def js(self, expression):
        """The value of an expression in the page, as JSON carries it; promises are awaited.

        The protocol evaluates it: the page's content policy, which forbids eval, stays in force.
        """
        said = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in said:
            raise RuntimeError(f"{expression}: {_exception(said['exceptionDetails'])}")
        return said["result"].get("value")

    def wait(self, expression, timeout=TIMEOUT):
        """Waits until an expression is true."""
        self._until(lambda: self.js(f"!!({expression})"), expression, timeout)

    @contextlib.contextmanager
    def inside(self, selector):
        """Within the block, `js`, `wait`, `text`, `count` and `focused` are of the page in a sandboxed frame, once it
        is there; TimeoutError if it never is."""
        element = self._call("Runtime.evaluate", expression=_element(selector))["result"]["objectId"]
        name = self._call("DOM.describeNode", objectId=element)["node"]["frameId"]
        self._until(lambda: name in self._frames, f"{selector} to have a process of its own")
        with self._in(self._frames[name]):
            self.wait(_LOADED)
            yield

    @contextlib.contextmanager
    def _in(self, session):
        own, self._session = self._session, session
        try:
            yield
        finally:
            self._session = own

    def text(self, selector):
        """The visible text of the first element; RuntimeError if there is none."""
        return self.js(f"{_element(selector)}.innerText")

    def count(self, selector):
        return self.js(f"document.querySelectorAll({json.dumps(selector)}).length")

    def center(self, selector):
        """(x, y) of its middle in the window, after scrolling there."""
        x, y, width, height = self.box(selector)
        return x + width / 2, y + height / 2

    def box(self, selector):
        """(x, y, width, height) in the window, after scrolling there."""
        return self.js(
            f"(() => {{const e = {_element(selector)};"
            "e.scrollIntoView({block: 'center', inline: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
        )

    def click(self, selector, *, at=(0.5, 0.5), shift=False):
        """A real click of the mouse into an element; `at` in fractions of its width and height."""
        x, y, width, height = self.box(selector)
        self.drag([(x + at[0] * width, y + at[1] * height)], shift=shift)

    def drag(self, points, *, shift=False):
        """Presses the mouse at the first point of the window, moves along, lets go at the last."""
        held = dict(button="left", clickCount=1, modifiers=_SHIFT if shift else 0)

        def mouse(kind, x, y, **kw):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **kw)

        mouse("mouseMoved", *points[0], modifiers=held["modifiers"])
        mouse("mousePressed", *points[0], **held)
        for point in points[1:]:
            mouse("mouseMoved", *point, buttons=1, **held)
        mouse("mouseReleased", *points[-1], **held)

    def key(self, name, *, shift=False):
        """Presses a key where the focus is: a name of `_KEYS`, or a character."""
        code, number, text = _KEYS.get(name, (name, ord(name.upper()[0]), name))
        same = dict(key=name, code=code, windowsVirtualKeyCode=number, modifiers=_SHIFT if shift else 0)
        down = dict(type="keyDown", text=text) if text else dict(type="rawKeyDown")
        self._call("Input.dispatchKeyEvent", **down, **same)
        self._call("Input.dispatchKeyEvent", type="keyUp", **same)

    def write(self, text):
        """Types text where the focus is."""
        self._call("Input.insertText", text=text)

    def set(self, selector, value):
        """Sets the value of a field, list or slider, and tells the page as a user's change does."""
        self.js(
            f"(() => {{const e = {_element(selector)};"
            f"e.value = {json.dumps(value)};"
            "for (const t of ['input', 'change'])"
            " e.dispatchEvent(new Event(t, {bubbles: true}));})()"
        )

    def upload(self, selector, path):
        """Chooses a file, as its user does."""
        element = self._call("Runtime.evaluate", expression=_element(selector))["result"]["objectId"]
        self._call("DOM.setFileInputFiles", files=[str(path)], objectId=element)

    def focused(self):
        """What has the focus: "tag#id.class"."""
        return self.js(
            "(e => e.tagName.toLowerCase() + (e.id ? '#' + e.id : '') +"
            " [...e.classList].map(c => '.' + c).join(''))(document.activeElement)"
        )

    def resize(self, width, height):
        """Size of the window in CSS pixels."""
        self._size = width, height
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def emulate(self, *, dark=None, reduced_motion=None, media=""):
        """Preferences of the user; media="print" shows the page as it would be printed."""
        features = {
            "prefers-color-scheme": {True: "dark", False: "light"}.get(dark, ""),
            "prefers-reduced-motion": {True: "reduce"}.get(reduced_motion, ""),
        }
        self._call(
            "Emulation.setEmulatedMedia", media=media, features=[dict(name=k, value=v) for k, v in features.items()]
        )

    def screenshot(self, path=None, *, whole=True):
        """A PNG of the window, or of the whole page, as bytes and in a file if one is given."""
        size = self._size
        if whole:
            self._until(lambda: len(self._frames) >= self.count("iframe[sandbox]"), "its frames")
            # In a window as high as the page: what is outside of it need not be painted, frames least of all
            for _ in range(2):  # since heights may depend on the window's
                self.resize(size[0], math.ceil(self._call("Page.getLayoutMetrics")["cssContentSize"]["height"]))
        for session in (*(self._frames.values() if whole else ()), self._session):
            with self._in(session):
                self.wait(_LOADED)
                self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        png = base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
        if whole:
            self.resize(*size)
        if path is not None:
            pathlib.Path(path).write_bytes(png)
        return png

    def downloads(self):
        """Lets the page save files; → the folder where they arrive."""
        folder = self._folder / "downloads"
        folder.mkdir(exist_ok=True)
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        return folder

    def downloaded(self, timeout=TIMEOUT):
        """Waits for a whole file in that folder, takes it → (name, bytes)."""
        folder, found = self._folder / "downloads", []

        def arrived():
            # Chromium first makes an empty file of that name, to reserve it, and moves the whole one there.
            done = (p for p in folder.iterdir() if p.suffix not in (".crdownload", ".tmp"))
            found[:] = [p for p in done if p.stat().st_size]
            return found

        self._until(arrived, "a download", timeout)
        data = found[0].read_bytes()
        found[0].unlink()
        return found[0].name, data

    # The protocol.

    def _send(self, method, session, **params):
        self._count += 1
        message = dict(id=self._count, method=method, params=params)
        self._pipe.send(message | (dict(sessionId=session) if session else {}))

    def _call(self, method, *, in_tab=False, **params):
        """The answer to a message. Those about targets and the browser are put to the browser unless `in_tab`."""
        is_ours = in_tab or not method.startswith(("Target.", "Browser."))
        self._send(method, self._session if is_ours else None, **params)
        count = self._count
        until = time.monotonic() + TIMEOUT
        while (said := self._pipe.receive(until)) is not None:
            if said.get("id") == count:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']['message']}")
                return said["result"]
            self._heard(said)
        raise TimeoutError(f"chromium didn't answer {method} in {TIMEOUT} s")

    def _until(self, is_so, what, timeout=TIMEOUT):
        until = time.monotonic() + timeout
        while not is_so():
            if time.monotonic() > until:
                raise TimeoutError(f"waited {timeout} s for {what}")
            if said := self._pipe.receive(min(until, time.monotonic() + 0.02)):
                self._heard(said)

    def _heard(self, message):
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Target.attachedToTarget" if params["targetInfo"]["type"] == "iframe":
                self._frames[params["targetInfo"]["targetId"]] = params["sessionId"]
                for method in (*(f"{domain}.enable" for domain in _HEARD), "Runtime.runIfWaitingForDebugger"):
                    self._send(method, params["sessionId"])
            case "Target.detachedFromTarget":
                self._frames = {k: v for k, v in self._frames.items() if v != params["sessionId"]}
            case "Target.attachedToTarget" if params["waitingForDebugger"]:  # a worker, which nothing of ours has
                self._send("Runtime.runIfWaitingForDebugger", params["sessionId"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Network.webSocketCreated":
                self.requests.append(params["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(_exception(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                said = [str(a.get("value", a.get("description"))) for a in params["args"]]
                self.problems.append(f"console.{params['type']}: {' '.join(said)}")
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                entry = params["entry"]
                self.problems.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")


def _element(selector):
    quoted = json.dumps(selector)
    return f"(document.querySelector({quoted}) || (() => {{throw new Error('no element ' + {quoted})}})())"


def _exception(details):
    return details.get("exception", {}).get("description") or details["text"]
