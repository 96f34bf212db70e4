"""`explain --serve`: a page to ask on, for the browser of the person who started it.

Python's own HTTP server is enough: one user, six addresses, no dependency. What it may be trusted with:

* It listens on 127.0.0.1 alone. The Host header must name this machine, or a page on the web could have its own name
  resolved to 127.0.0.1 and read the answers (DNS rebinding). A POST must come from the page itself (Origin).
* All addresses begin with a random token, which is printed once, logged nowhere and compared in constant time: other
  users of the machine can reach the port.
* Nothing in a request names a file. Images of --image_dir are numbers in a list that was made at the start; an
  uploaded file's name is a title.
* Requests have limits of size and time, connections of number; so do images and answers in memory (`asking`).
* Pages may load nothing from anywhere else; a saliency page is framed in a sandbox without an origin.
"""

import hmac
import http.server
import io
import json
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import urllib.parse

import PIL.Image

from paligemma_med import page
from paligemma_med.explain import asking
from paligemma_med.explain.page import FOLDER
from paligemma_med.pp import json_text, windows

HOST = "127.0.0.1"
MAX_BYTES = 64 * 2**20  # of an uploaded file
MAX_PIXELS = 32 * 10**6  # of an image
MAX_JSON = 32 * 2**10
MAX_EXAMPLES = 1000
MAX_CONNECTIONS = 32
HEAD_SECONDS, BODY_SECONDS, SEND_SECONDS, LINGER_SECONDS = 10, 120, 60, 2
STYLES, SCRIPT = ("page.css", "ask.css"), "ask.js"
_THIS_MACHINE = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.ASCII)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
# The report brings the rest of its policy itself (`page.policy`). With an opener policy as well, browsers may refuse a
# page that is sandboxed.
_FRAMED = "sandbox allow-scripts allow-downloads; frame-ancestors 'self'"


class Refused(Exception):
    """A request that isn't served: status and one sentence."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


class Server(http.server.ThreadingHTTPServer):
    """Bound to a port of this machine; requests wait until `desk` is set and `serve_forever` runs.

    Args:
      port: 0 takes a free one.
      examples: [(name, path)] of images that the page offers.

    Raises:
      ValueError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True  # of a server that ended just now; another that runs is still noticed

    def __init__(self, port: int, examples=()):
        self.desk: asking.Desk | None = None
        self.examples = list(examples)[:MAX_EXAMPLES]
        self.token = secrets.token_urlsafe(24)
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._page = None
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as e:
            raise ValueError(f"--port={port}: {e.strerror}. Give another; 0 takes a free one.") from None

    @property
    def address(self) -> str:
        """Where the page is, token included."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    def page(self) -> tuple[bytes, str]:
        """(the page to ask on, its content policy)."""
        if self._page is None:
            data = dict(max_bytes=MAX_BYTES, has_turns=self.desk.has_turns)
            names = [page.clean(name) for name, _ in self.examples]
            kw = dict(style=STYLES, script=SCRIPT, same_origin=True)
            limits = dict(mib=MAX_BYTES // 2**20, megapixels=MAX_PIXELS // 10**6, question=asking.MAX_QUESTION)
            text = page.render(
                FOLDER,
                "ask.html.jinja",
                data=data,
                **kw,
                names=names,
                windows=list(windows.PRESETS),
                window=self.desk.window and (self.desk.window.name or "{:g}, {:g}".format(*self.desk.window[:2])),
                limits=limits,
                weights=page.clean(self.desk.loaded.weights),
                has_turns=self.desk.has_turns,
                is_kept=bool(self.desk.keep),
                images=asking.MAX_IMAGES,
            )
            self._page = text.encode(), page.policy_of(FOLDER, **kw) + "; frame-ancestors 'none'"
        return self._page

    def verify_request(self, request, client_address) -> bool:
        """False, and the connection is closed, if there are too many."""
        return self._free.acquire(blocking=False)

    def process_request_thread(self, request, client_address) -> None:
        """One request, in a thread of its own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def run(server) -> None:
    """Compiles, says where the page is, and serves until KeyboardInterrupt."""
    server.desk.warm_up()
    server.page()
    port = server.server_address[1]
    print(
        f"Ready: {server.address}\n"
        "Research only, not for diagnosis. Who has this address can ask; Ctrl-C ends it. From another machine:\n"
        f"  ssh -L {port}:{HOST}:{port} THIS_MACHINE    and open the same address there.",
        flush=True,
    )
    server.serve_forever()


def limit_pixels() -> None:
    """Sets the limit that all readers of images heed, DICOM included, to what a page takes."""
    PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class _Timed(io.RawIOBase):
    """What a socket receives until a point in time, however slowly it comes."""

    def __init__(self, connection, seconds):
        self._connection = connection
        self.allow(seconds)

    def allow(self, seconds):
        self._until = time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(http.server.BaseHTTPRequestHandler):
    server_version, sys_version = "paligemma_med", ""
    unread = 0  # bytes of the body

    def setup(self):
        super().setup()
        self._timed = _Timed(self.connection, HEAD_SECONDS)
        self.rfile = io.BufferedReader(self._timed)

    def log_message(self, format, *args):
        """Nothing: addresses hold the token."""

    def send_error(self, code, message=None, explain=None):
        """Called by the base class for a request that isn't HTTP, or has another method than those below."""
        self._send(int(code), dict(error=f"This request is not understood ({int(code)})."))

    def do_GET(self):  # noqa: N802 (the base class calls it so)
        self._answer("GET")

    def do_POST(self):  # noqa: N802
        self._answer("POST")

    def _answer(self, method):
        try:
            rest = self._checked(method)
            found = self._get(rest) if method == "GET" else self._post(rest)
        except Refused as e:
            found = (e.status, dict(error=str(e)))
        except asking.Busy as e:
            found = (503, dict(error=str(e)))
        except asking.Gone as e:
            found = (404, dict(error=str(e)))
        except ValueError as e:
            found = (400, dict(error=_sentence(e)))
        except TimeoutError:
            found = (408, dict(error="The request took too long to arrive."))
        except Exception as e:
            traceback.print_exc()
            found = (500, dict(error=f"This failed ({type(e).__name__}); the terminal of the program says more."))
        self._send(*found)

    def _checked(self, method):
        """What follows the token in the address; Refused unless the request is for this server and from its page."""
        self.unread = self._length()
        host = self.headers.get_all("Host", [])
        if len(host) != 1 or not _THIS_MACHINE.fullmatch(host[0]):
            raise Refused(403, "This server is for this machine only: open the address that the program printed.")
        origin = self.headers.get_all("Origin", [])
        is_foreign = origin != [f"http://{host[0]}"] and (origin or method == "POST")
        if is_foreign or (method == "POST" and self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin"):
            raise Refused(403, "This request comes from another page.")
        first, token, rest = (self.path.partition("?")[0].split("/", 2) + ["", ""])[:3]
        given = token.encode("utf-8", "replace")
        if first or not hmac.compare_digest(given, self.server.token.encode()):
            raise Refused(404, "There is nothing here: open the address that the program printed.")
        return rest

    def _length(self):
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) > 1:
            raise Refused(411, "Expected a request with one Content-Length.")
        if lengths and not re.fullmatch(r"[0-9]{1,15}", lengths[0].strip(), re.ASCII):
            raise Refused(400, "Content-Length is not a number.")
        return int(lengths[0]) if lengths else 0

    def _get(self, rest):
        desk = self.server.desk
        if rest == "":
            return 200, *self.server.page()
        if rest == "state":
            return 200, dict(doing=desk.doing)
        if match := re.fullmatch(r"page/([0-9]{1,9})", rest, re.ASCII):
            return 200, desk.html(match[1]).encode(), _FRAMED
        raise Refused(404, "There is nothing here.")

    def _post(self, rest):
        desk = self.server.desk
        if rest == "image":
            name = urllib.parse.unquote(self.headers.get("X-Name", "") or "image", errors="replace")
            return 200, desk.add_image(self._body(MAX_BYTES), name, self.headers.get("X-Show", ""))
        if rest == "example":
            asked = self._json({"index", "show"})
            return 200, self._example(asked["index"], asked["show"])
        if rest == "ask":
            asked = self._json({"image", "question", "history"})
            return 200, desk.ask(asked["image"], asked["question"], asked["history"] is True)
        if rest == "page":
            asked = self._json({"answer"})
            desk.report(asked["answer"])
            return 200, dict(page=f"page/{asked['answer']}")
        raise Refused(404, "There is nothing here.")

    def _example(self, index, show):
        examples = self.server.examples
        if type(index) is not int or not 0 <= index < len(examples):
            raise Refused(404, f"There is no such example; expected a number from 0 to {len(examples) - 1}.")
        if not isinstance(show, str):
            raise Refused(400, "What to show of the example isn't a text.")
        name, path = examples[index]
        try:
            with open(path, "rb") as f:
                content = f.read(MAX_BYTES + 1)
        except OSError as e:
            raise Refused(404, f"{page.clean(name)}: {e.strerror}.") from None
        if len(content) > MAX_BYTES:
            raise Refused(413, f"{page.clean(name)} has more than {MAX_BYTES // 2**20} MiB.")
        return self.server.desk.add_image(content, name, show)

    def _json(self, keys):
        text = self._body(MAX_JSON)
        found = json_text.parse(text, "The request", "an object", root=dict)
        if found.keys() != keys:
            raise Refused(400, f"The request has the keys {sorted(found)}; expected {sorted(keys)}.")
        return found

    def _body(self, limit):
        if not self.unread:
            raise Refused(400, "The request is empty.")
        if self.unread > limit:
            size = f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"
            raise Refused(413, f"The file or question has {self.unread:,} bytes; expected at most {size}.")
        self._timed.allow(BODY_SECONDS)
        content = self.rfile.read(self.unread)
        if len(content) < self.unread:
            raise Refused(400, "The request ended too early.")
        self.unread = 0
        return content

    def _send(self, status, content, policy=_NOTHING):
        kind = "text/html" if isinstance(content, bytes) else "application/json"
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {**_HEADERS, "Content-Security-Policy": policy}
        if policy == _FRAMED:
            del headers["Cross-Origin-Opener-Policy"]
        self.connection.settimeout(SEND_SECONDS)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.unread:
            self._linger()

    def _linger(self):
        """Takes what still comes for a moment: a connection closed with unread bytes is reset, and the client would
        never see the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self._timed.allow(LINGER_SECONDS)
        try:
            while self.rfile.read(2**16):
                pass
        except OSError:
            pass


def _sentence(error):
    text = " ".join(str(error).split())[:500]
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
