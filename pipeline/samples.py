"""Samples: rows of any layout as canonical messages, and identities that hold anywhere.

Every layout becomes the same thing, a tuple of messages::

    Alpaca             instruction, input, output  ->  user, input, assistant
    prompt/completion  prompt, completion          ->  user, assistant
    messages           [{role, content}]           ->  as they are
    ShareGPT           [{from, value}]             ->  human -> user, gpt -> assistant, ...

A `system` column comes first in every layout; earlier turns (`history`) come before an instruction
or a prompt.

An Alpaca input keeps a role of its own ('input'), so that instruction and input stay apart; an
empty one is no message, so that the same text has the same identity in every layout.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any, Literal

import pyarrow as pa

from pipeline.config_base import Layout
from pipeline.layouts import Columns
from pipeline.schemas import BAD_LINE

CANONICALISER_VERSION = 2

Role = Literal["system", "user", "input", "assistant", "tool"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_TOOL_CALL_ROLES = {"function_call", "tool_call"}


class MalformedSampleError(ValueError):
    """A row that cannot be made a sample, or rendered; the message is the reason stored with it."""


@dataclass(frozen=True)
class Message:
    """One message of a sample."""

    role: Role
    content: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    """What a chat template may render besides: tool_calls, name, tool_call_id."""


@dataclass(frozen=True)
class Sample:
    """One input row, canonical; `malformed` says why there is none."""

    messages: tuple[Message, ...] = ()
    malformed: str | None = None


def read_samples(table: pa.Table, columns: Columns) -> Iterator[Sample]:
    """One canonical sample per row of a shard's table, in order."""
    values = [_to_python(table.column(name)) for name in columns.names.values()]
    faults = table.column(BAD_LINE).to_pylist() if BAD_LINE in table.schema.names else repeat(None)
    fields = list(columns.names)
    reader = _READERS[columns.layout]
    for fault, *row in zip(faults, *values, strict=BAD_LINE in table.schema.names):
        try:
            if fault is not None:
                raise MalformedSampleError(f"bad_line: {fault}")
            if not fields:  # a piece whose objects are all empty
                raise MalformedSampleError("empty_object")
            if any(value is _NOT_UTF8 for value in row):
                raise MalformedSampleError("utf8")
            yield Sample(tuple(reader(dict(zip(fields, row, strict=True)))))
        except MalformedSampleError as err:
            yield Sample(malformed=str(err))


def sample_id(messages: tuple[Message, ...]) -> bytes:
    """128-bit identity of a sample's content: BLAKE2b over length-prefixed roles and contents.

    Exact UTF-8, no normalisation: ('ab', 'c') and ('a', 'bc') differ, and so do é and e + U+0301.
    """
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        parts = [message.role, message.content]
        for key in sorted(message.extra):
            # Sorted: a struct's keys come in the order of its file's schema.
            parts += [key, json.dumps(message.extra[key], sort_keys=True, default=repr)]
        digest.update(len(parts).to_bytes(8, "little"))
        for part in parts:
            raw = part.encode("utf-8")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    return digest.digest()


_NOT_UTF8 = object()


def _to_python(column: pa.ChunkedArray) -> list[Any]:
    """Python values; a value whose bytes are no UTF-8, which Parquet does not check, is marked."""
    try:
        return list(column.to_pylist(maps_as_pydicts="lossy"))
    except UnicodeDecodeError:
        return [_scalar_to_python(scalar) for scalar in column]


def _scalar_to_python(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        return _NOT_UTF8


def _single_turn(row: dict[str, Any], asked: str) -> Iterator[Message]:
    if row[asked] is None:
        raise MalformedSampleError(f"null_{asked}")
    if system := row.get("system"):
        yield Message("system", system)
    for turn in row.get("history") or ():
        if not turn or len(turn) != 2 or None in turn:
            raise MalformedSampleError("history")
        yield Message("user", turn[0])
        yield Message("assistant", turn[1])
    yield Message("user", row[asked])
    if extra := row.get("input"):
        yield Message("input", extra)
    yield Message("assistant", row["response"] or "")


def _conversation(row: dict[str, Any], column: str, role: str, content: str) -> Iterator[Message]:
    messages = list(_chat(row[column], role, content))
    if row.get("system") and messages[0].role != "system":
        yield Message("system", row["system"])
    yield from messages


def _chat(turns: list[dict[str, Any]] | None, role_key: str, content_key: str) -> Iterator[Message]:
    if turns is None:
        raise MalformedSampleError("null_messages")
    if not turns:
        raise MalformedSampleError("no_messages")
    for turn in turns:
        if turn is None:
            raise MalformedSampleError("null_message")
        name = turn[role_key]
        # The field is OpenAI's of before tool_calls, which templates do not know.
        if (isinstance(name, str) and name in _TOOL_CALL_ROLES) or _without_nulls(
            turn.get("function_call")
        ):
            raise MalformedSampleError("tool_call")
        role = _ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise MalformedSampleError("role")
        extra = {
            key: _without_nulls(turn[key])
            for key in ("tool_calls", "name", "tool_call_id")
            if turn.get(key)
        }
        content = turn[content_key]
        if content is None and (role == "assistant"):
            content = ""  # an unanswered turn, or one that only calls a tool
        yield Message(role, _joined(content), extra)


def _joined(content: Any) -> str:
    """Text of a content that is a string or OpenAI's list of parts."""
    if isinstance(content, list):
        parts = [p for p in content if p is not None]
        if any(not isinstance(p, dict) or p.get("text") is None for p in parts):
            raise MalformedSampleError("content")
        return "".join(p["text"] for p in parts)
    if not isinstance(content, str):
        raise MalformedSampleError("content")
    return content


def _without_nulls(value: Any) -> Any:
    """Parquet fills a struct's absent keys with null; a template must not see them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value if v is not None]
    return value


_READERS: dict[Layout, Any] = {
    "alpaca": partial(_single_turn, asked="instruction"),
    "prompt_completion": partial(_single_turn, asked="prompt"),
    "messages": partial(_conversation, column="messages", role="role", content="content"),
    "sharegpt": partial(_conversation, column="conversations", role="from", content="value"),
}
