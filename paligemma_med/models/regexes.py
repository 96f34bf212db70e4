"""Regexes that configs and adapters bring, matched against names of parameters and modules in linear time.

Python's own engine tries ways to match one after another, and some regexes have more ways than there is time: one in a
file from elsewhere could stop a program for good. So they go to RE2, which has no such regexes. It knows no lookahead,
which fine-tuning programs do write into their adapters ("^(model)(?!.*(lm_head|wte)).*"): one that stands outside of
groups is matched here, piece by piece.
"""

import functools
import re
from typing import Any, NamedTuple

import re2

_LONGEST = 4000  # characters of a regex with a lookahead, which is searched for by Python
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[=!]|.", re.DOTALL)


class Pattern(NamedTuple):
    """A compiled regex.

    pattern: its text. before, inside, after: compiled by RE2; the last two are None unless there is a lookahead, which
    stands between `before` and `after`. ahead: "=" or "!".
    """

    pattern: str
    before: Any
    ahead: str = ""
    inside: Any = None
    after: Any = None

    def fullmatch(self, name: str) -> bool:
        """Whether the regex matches the whole name, as `re.fullmatch` would say."""
        name = name.encode("utf-8", "replace").decode()
        if not self.ahead:
            return self.before.fullmatch(name) is not None
        return any(
            self.before.fullmatch(name, 0, i)
            and (self.inside.match(name, i) is not None) == (self.ahead == "=")
            and self.after.fullmatch(name, i)
            for i in range(len(name) + 1)
        )


@functools.lru_cache(1000)
def compile(regex: str) -> Pattern:
    """The regex, compiled.

    Raises:
      ValueError: it is none, or none that runs in linear time. The message is the end of a sentence: "is not …".
    """
    try:
        return Pattern(regex, _compile(regex))
    except re2.error as e:
        # RE2 has no attributes for what is wrong; its message begins with it.
        problem = e.args[0].decode("utf-8", "replace") if isinstance(e.args[0], bytes) else str(e)
    except UnicodeEncodeError:
        problem = "half a surrogate pair"
    if pieces := _pieces(regex):
        before, ahead, inside, after = pieces
        try:
            return Pattern(regex, _compile(before), ahead, _compile(inside), _compile(after))
        except re2.error:
            pass
    raise ValueError(
        f"is not a regular expression of RE2's syntax (with one lookahead at most, outside of groups): {problem[:100]}"
    )


def fullmatch(regex: str, name: str) -> bool:
    """`compile(regex).fullmatch(name)`."""
    return compile(regex).fullmatch(name)


def _compile(regex):
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True  # thousands of groups would take their time
    return re2.compile(regex, options)


def _pieces(regex):
    """(before, "=" or "!", inside, after) of a regex with one lookahead, in no group and beside no alternative."""
    if len(regex) > _LONGEST:
        return None
    depth, found = 0, []
    for token in _TOKEN.finditer(regex):
        text = token[0]
        if text == "|" and not depth:
            return None
        if text in ("(?=", "(?!"):
            if depth or found:
                return None
            found = [token.start(), text[-1], token.end()]
        depth += text[0] == "("
        depth -= text == ")"
        if len(found) == 3 and not depth:
            found.append(token.start())
    if len(found) < 4:
        return None
    start, ahead, inside, end = found
    return regex[:start], ahead, regex[inside:end], regex[end + 1 :]
