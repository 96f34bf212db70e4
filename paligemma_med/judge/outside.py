"""Text from outside, before it is printed or kept: what a server said, and what holds an address.

A server can repeat the key that it was sent, whole or in part, in any field of its replies, and an address can hold a
password. Each such text comes through here. It is cleaned first and cut to a length afterwards: of a key that a cut
went through, what is left would no longer be recognised.
"""

import re
import string

PART = 8  # characters: so much of a key, in a row, is taken out
_SHORTEST_KEY = 5  # a shorter one, such as "none", is a word
_LONGEST = 20_000  # of what is to become a line; the rest is dropped before cleaning, which takes its time

_MASKED_KEY = re.compile(r"\bsk-[\w*.-]{4,}")  # as OpenAI's messages show keys
_LOGIN = re.compile(r"(?<=://)[^/\s?#]{1,2000}@")
_FRAGMENT = re.compile(r"(://[^\s#]{0,2000})#[^\s'\"]+")
_SECRET_PARAMETER = re.compile(
    r"([?&][^=&\s#]{0,40}(?:key|token|secret|passw|sig|auth|credential)[^=&\s#]{0,40}=)[^&\s#'\"]+", re.IGNORECASE
)
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # unlike str.lower, leaves the length


class Outside:
    """Takes one server's key, and what else is secret, out of texts.

    Args:
      key: as sent to the server.
    """

    def __init__(self, key: str):
        key = key.translate(_LOWER)
        self._length = min(PART, len(key))
        starts = range(len(key) - self._length + 1) if len(key) >= _SHORTEST_KEY else ()
        self._parts = {key[i : i + self._length] for i in starts}

    def content(self, text: str) -> str:
        """A text that is kept as it is, but for the key, parts of it of eight characters or more, and masked keys."""
        return _MASKED_KEY.sub("[key]", self._without_parts(text) if self._parts else text)

    def line(self, text: str, most: int = 300) -> str:
        """A text as one printable line of at most so many characters, without key, logins, fragments of addresses
        and parameters that hold a secret."""
        text = "".join(c if c.isprintable() else " " for c in text[:_LONGEST])
        text = self.content(address(text))
        return " ".join(text.split())[:most]

    def _without_parts(self, text):
        small, n = text.translate(_LOWER), self._length
        kept, end, at = [], 0, 0
        while at <= len(small) - n:
            if small[at : at + n] not in self._parts:
                at += 1
                continue
            kept.append(text[end:at])
            end = at + n
            while small[end - n + 1 : end + 1] in self._parts:
                end += 1
            at = end
        return "[key]".join([*kept, text[end:]])


def address(text: str) -> str:
    """A text without what is secret in the addresses in it: logins, fragments, parameters named like keys."""
    text = _SECRET_PARAMETER.sub(r"\1[…]", _LOGIN.sub("[…]@", text))
    return _FRAGMENT.sub(r"\1#[…]", text)
