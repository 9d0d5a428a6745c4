"""Samples: the four layouts, canonical messages, and identities that hold anywhere.

Every layout becomes the same thing, a tuple of messages::

    Alpaca             instruction, input, output  ->  user, input, assistant
    prompt/completion  prompt, completion          ->  user, assistant
    messages           [{role, content}]           ->  as they are
    ShareGPT           [{from, value}]             ->  human -> user, gpt -> assistant, ...

An Alpaca input keeps a role of its own ('input'), so that instruction and input stay apart; an
empty one is no message, so that the same text has the same identity in every layout.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal

import pyarrow as pa

from pipeline.config_base import Layout
from pipeline.errors import InputError
from pipeline.schemas import BAD_LINE

CANONICALISER_VERSION = 1

LAYOUT_ORDER: tuple[Layout, ...] = ("messages", "sharegpt", "prompt_completion", "alpaca")

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


@dataclass(frozen=True)
class Columns:
    """Which column holds what, in one shard."""

    layout: Layout
    names: dict[str, str]
    """Field of the layout -> column name. Optional fields that the shard lacks are left out, unless
    the config maps them."""

    def describe(self) -> str:
        """`alpaca (instruction=instruction, response=output)`, for the terminal."""
        return f"{self.layout} ({', '.join(f'{k}={v}' for k, v in self.names.items())})"


# Field -> names to try, the layout's own first. A field in _OPTIONAL may be absent,
# unless the config maps it.
_FIELDS: dict[Layout, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",)},
    "sharegpt": {"conversations": ("conversations", "conversation")},
    "prompt_completion": {"prompt": ("prompt",), "response": ("completion", "response")},
    "alpaca": {
        "instruction": ("instruction",),
        "input": ("input", "context"),
        "response": ("output", "response"),
    },
}
_OPTIONAL = {"input"}
_TEXT_FIELDS = {"instruction", "input", "response", "prompt"}


def find_columns(
    schema: pa.Schema, where: str, layout: Literal["auto"] | Layout, mapped: dict[Any, str]
) -> Columns:
    """Find the layout of a shard and check its columns' types.

    Args:
        schema: The shard's.
        where: The shard's URL, for messages.
        layout: A layout, or `auto`: the first that fits, in the order of LAYOUT_ORDER.
        mapped: Field -> column, from the config; wins over the layout's own names.

    Raises:
        InputError: No layout fits, a column is missing, or its type is wrong.
    """
    tried = LAYOUT_ORDER if layout == "auto" else (layout,)
    for candidate in tried:
        fields = _FIELDS[candidate]
        if not set(mapped) <= set(fields):
            continue  # a mapped field names the layout: {prompt: question} is never Alpaca
        names = {f: _resolve(f, fields[f], schema, mapped) for f in fields}
        needed = set(fields) - _OPTIONAL | set(mapped)
        missing = [f for f, name in names.items() if name is None and f in needed]
        if not missing:
            found = Columns(candidate, {f: n for f, n in names.items() if n is not None})
            _check_types(schema, where, found)
            return found
    has = ", ".join(schema.names)
    if absent := {f: name for f, name in mapped.items() if name not in schema.names}:
        field, name = next(iter(absent.items()))
        near = difflib.get_close_matches(name, schema.names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise InputError(
            f"shard {where}: column '{name}' is missing (has: {has}), which "
            f"input.columns.{field} names.{hint}"
        )
    if layout == "auto":
        columns = {k: ", ".join(" or ".join(c) for c in v.values()) for k, v in _FIELDS.items()}
        known = "; ".join(f"{name}: {listed}" for name, listed in columns.items())
        raise InputError(
            f"shard {where}: no known layout fits its columns (has: {has}; known: {known}). "
            "Map them, for example: --set input.columns.instruction=question "
            "--set input.columns.response=answer."
        )
    if foreign := sorted(set(mapped) - set(_FIELDS[layout])):
        raise InputError(
            f"shard {where}: layout {layout} has no field '{foreign[0]}' to map (has: "
            f"{', '.join(_FIELDS[layout])}). Take out input.columns.{foreign[0]}."
        )
    name = mapped.get(missing[0], _FIELDS[tried[0]][missing[0]][0])
    raise InputError(
        f"shard {where}: column '{name}' is missing (has: {has}) for layout {layout}. "
        f"Map it: input.columns.{missing[0]}=NAME."
    )


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
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_scalar_to_python(scalar) for scalar in column]


def _scalar_to_python(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _NOT_UTF8


def _resolve(
    name: str, candidates: tuple[str, ...], schema: pa.Schema, mapped: dict[Any, str]
) -> str | None:
    if name in mapped:
        return mapped[name] if mapped[name] in schema.names else None
    return next((c for c in candidates if c in schema.names), None)


def _check_types(schema: pa.Schema, where: str, columns: Columns) -> None:
    for name, column in columns.names.items():
        kind = schema.field(column).type
        if name in _TEXT_FIELDS:
            fits, expected = _is_text(kind), "a string"
        else:
            keys = ("role", "content") if columns.layout == "messages" else ("from", "value")
            fits = _is_list_of(kind, keys)
            expected = f"a list of structs with {keys[0]} and {keys[1]}"
        if not fits:
            raise InputError(
                f"shard {where}: column '{column}' has type {kind}, expected {expected} for "
                f"layout {columns.layout}. Convert it, or map another: input.columns.{name}=NAME."
            )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _is_list_of(kind: pa.DataType, keys: tuple[str, str]) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    item = kind.value_type
    return pa.types.is_struct(item) and {f.name for f in item} >= set(keys)


def _alpaca(row: dict[str, str | None]) -> Iterator[Message]:
    instruction = row["instruction"]
    if instruction is None:
        raise MalformedSampleError("null_instruction")
    yield Message("user", instruction)
    if extra := row.get("input"):
        yield Message("input", extra)
    yield Message("assistant", row["response"] or "")


def _prompt_completion(row: dict[str, str | None]) -> Iterator[Message]:
    prompt = row["prompt"]
    if prompt is None:
        raise MalformedSampleError("null_prompt")
    yield Message("user", prompt)
    yield Message("assistant", row["response"] or "")


def _messages(row: dict[str, Any]) -> Iterator[Message]:
    yield from _chat(row["messages"], "role", "content")


def _sharegpt(row: dict[str, Any]) -> Iterator[Message]:
    yield from _chat(row["conversations"], "from", "value")


def _chat(turns: list[dict[str, Any]] | None, role_key: str, content_key: str) -> Iterator[Message]:
    if turns is None:
        raise MalformedSampleError("null_messages")
    if not turns:
        raise MalformedSampleError("no_messages")
    for turn in turns:
        if turn is None:
            raise MalformedSampleError("null_message")
        name = turn[role_key]
        if isinstance(name, str) and name in _TOOL_CALL_ROLES:
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
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _sharegpt,
}
