"""Layouts: which columns of a shard hold what.

Found by the columns' names and types, or mapped in the config. Whatever could be meant in two ways
is refused: a column that nobody reads would make every score wrong, and no count would tell.
"""

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from pipeline.config_base import OPTIONAL_FIELDS, Layout
from pipeline.errors import InputError

LAYOUT_ORDER: tuple[Layout, ...] = ("messages", "sharegpt", "prompt_completion", "alpaca")


@dataclass(frozen=True)
class Columns:
    """Which column holds what, in one shard."""

    layout: Layout
    names: dict[str, str]
    """Field of the layout -> column name. Optional fields that the shard lacks are left out, unless
    the config maps them."""

    @property
    def chats(self) -> bool:
        """Whether samples may have a system message and several turns."""
        return bool({"messages", "conversations", "system", "history"} & self.names.keys())

    def describe(self) -> str:
        """`alpaca (instruction=instruction, response=output)`, for the terminal."""
        return f"{self.layout} ({', '.join(f'{k}={v}' for k, v in self.names.items())})"


# Field -> names to try, the layout's own first. A field in OPTIONAL_FIELDS may be absent,
# unless the config maps it.
_FIELDS: dict[Layout, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",), "system": ("system",)},
    "sharegpt": {"conversations": ("conversations", "conversation"), "system": ("system",)},
    "prompt_completion": {
        "prompt": ("prompt",),
        "response": ("completion", "response"),
        "system": ("system",),
        "history": ("history",),
    },
    "alpaca": {
        "instruction": ("instruction",),
        "input": ("input", "context"),
        "response": ("output", "response"),
        "system": ("system",),
        "history": ("history",),
    },
}
_TEXT_FIELDS = {"instruction", "input", "response", "system", "prompt"}


def find_columns(
    schema: pa.Schema, where: str, layout: Literal["auto"] | Layout, mapped: dict[Any, str | None]
) -> Columns:
    """Find the layout of a shard and check its columns' types.

    Args:
        schema: The shard's.
        where: The shard's URL, for messages.
        layout: A layout, or `auto`: the first that fits, in the order of LAYOUT_ORDER.
        mapped: Field -> column, from the config; wins over the layout's own names. None leaves an
            optional field out.

    Raises:
        InputError: No layout fits, a column is missing, its type is wrong, or two may be meant.
    """
    tried = LAYOUT_ORDER if layout == "auto" else (layout,)
    for candidate in tried:
        fields = _FIELDS[candidate]
        if not {field for field, name in mapped.items() if name is not None} <= set(fields):
            continue  # a mapped field names the layout: {prompt: question} is never Alpaca
        names = {f: _resolve(f, fields[f], schema, mapped) for f in fields}
        needed = set(fields) - OPTIONAL_FIELDS | {
            f for f, name in mapped.items() if name is not None
        }
        missing = [f for f, name in names.items() if name is None and f in needed]
        if not missing:
            found = Columns(candidate, {f: n for f, n in names.items() if n is not None})
            _check_meant(schema, where, candidate, mapped)
            _check_types(schema, where, found)
            return found
    has = ", ".join(schema.names)
    if absent := {f: n for f, n in mapped.items() if n is not None and n not in schema.names}:
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
    if foreign := sorted(
        f for f, n in mapped.items() if n is not None and f not in _FIELDS[layout]
    ):
        raise InputError(
            f"shard {where}: layout {layout} has no field '{foreign[0]}' to map (has: "
            f"{', '.join(_FIELDS[layout])}). Take out input.columns.{foreign[0]}."
        )
    name = mapped.get(missing[0]) or _FIELDS[tried[0]][missing[0]][0]
    raise InputError(
        f"shard {where}: column '{name}' is missing (has: {has}) for layout {layout}. "
        f"Map it: input.columns.{missing[0]}=NAME."
    )


def _resolve(
    name: str, candidates: tuple[str, ...], schema: pa.Schema, mapped: dict[Any, str | None]
) -> str | None:
    if name in mapped:
        return mapped[name] if mapped[name] in schema.names else None
    return next((c for c in candidates if c in schema.names), None)


def _check_meant(
    schema: pa.Schema, where: str, layout: Layout, mapped: dict[Any, str | None]
) -> None:
    """Else rows that fill the other column, as of two corpora in one file, would be half read."""
    for name, candidates in _FIELDS[layout].items():
        there = [column for column in candidates if column in schema.names]
        if name not in mapped and len(there) > 1:
            raise InputError(
                f"shard {where}: it has columns '{there[0]}' and '{there[1]}', and either may be "
                f"the {name}. Say which: input.columns.{name}={there[0]}, or ={there[1]}. Rows "
                "that fill now one, now the other belong in files of their own."
            )


def _check_types(schema: pa.Schema, where: str, columns: Columns) -> None:
    for name, column in columns.names.items():
        kind = schema.field(column).type
        if name in _TEXT_FIELDS:
            fits, expected = _is_text(kind), "a string"
        elif name == "history":
            fits = pa.types.is_null(kind) or (
                _is_list(kind) and (pa.types.is_null(kind.value_type) or _is_texts(kind.value_type))
            )
            expected = "a list of pairs of strings"
        else:
            keys = ("role", "content") if columns.layout == "messages" else ("from", "value")
            fits = pa.types.is_null(kind) or _is_list_of(kind, keys)
            expected = f"a list of structs with {keys[0]} and {keys[1]}"
        if not fits:
            raise InputError(
                f"shard {where}: column '{column}' has type {kind}, expected {expected} for "
                f"layout {columns.layout}. Convert it, or map another: input.columns.{name}=NAME"
                + (
                    f"; input.columns.{name}=null leaves it out."
                    if name in OPTIONAL_FIELDS
                    else "."
                )
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


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_texts(kind: pa.DataType) -> bool:
    return _is_list(kind) and _is_text(kind.value_type)


def _is_list_of(kind: pa.DataType, keys: tuple[str, str]) -> bool:
    if not _is_list(kind):
        return False
    item = kind.value_type
    return pa.types.is_struct(item) and {f.name for f in item} >= set(keys)
