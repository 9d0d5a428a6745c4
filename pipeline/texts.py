"""Foreign text made fit to be shown: on one line, without control characters, without secrets."""

import os
import re
import unicodedata

_SECRET_NAME = re.compile(r"SECRET|PASSWORD|(^|_)(TOKEN|KEY)$|CONNECTION_STRING")
"""Narrow: a word of a message that is the value of some other variable must stay."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LEAST_SECRET = 8
"""Characters; a shorter value is part of ordinary words."""

_EXCERPT = 110
"""Characters shown of a prompt and of a response."""


def plain(text: str, limit: int = _EXCERPT) -> str:
    """Text on one line, without control or formatting characters, cut at `limit`."""
    kept = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text[: 4 * limit])
    line = " ".join(kept.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def without_secrets(text: str) -> str:
    """Text with the values of secrets in the environment named instead of shown.

    Nothing here puts one into a message; this is for what a library may quote.
    """
    for name, value in os.environ.items():
        if len(value) >= _LEAST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, f"${name}")
    return text


def describe_cause(err: BaseException | None) -> str:
    """`RuntimeError: what it said`, without the traceback and the colours that Ray adds."""
    cause = getattr(err, "cause", None) or err
    last = [line for line in str(cause).splitlines() if line.strip()][-1:]
    return f"{type(cause).__name__}: {re.sub(_COLOURS, '', ''.join(last)).strip()}"


def count(number: int, noun: str) -> str:
    """`1 unit`, `2 units`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def visible(text: str) -> str:
    """Lines of text with control and formatting characters shown as U+FFFD."""
    return "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text)
