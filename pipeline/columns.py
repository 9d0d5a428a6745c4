"""The columns of a cherry subset: one schema for shards that differ."""

import difflib

import pyarrow as pa

from pipeline.budgets import SelectSettings
from pipeline.config_select import Format
from pipeline.errors import ConfigError, InputError
from pipeline.examples import example_keys, is_example
from pipeline.inputs import Corpus, Shard
from pipeline.schemas import BAD_LINE, SELECTED, SMALLEST_FRACTION

_GROUPS = ("is_string", "is_large_string", "is_string_view", "is_integer", "is_boolean", "is_null")
_TEXT = ("is_string", "is_large_string", "is_string_view")
_BYTES = ("is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary")


def added_columns(settings: SelectSettings) -> pa.Schema:
    """What a selection says of each row, after the input's own columns."""
    if settings.group_by and len(settings.fractions) > 1:
        return SELECTED.append(SMALLEST_FRACTION)
    return SELECTED


def output_schema(corpus: Corpus, settings: SelectSettings) -> pa.Schema:
    """Columns of the cherry subset: the input's, then those of `added_columns`.

    Those of the layouts are not among them where the format makes examples of them.

    Raises:
        InputError: As `merged_schema`; or a column has a name that the format gives to another.
        ConfigError: `group_by` names no column, or one whose values are no names of groups.
    """
    if settings.group_by:
        _check_group_by(settings.group_by, [shard for shard in corpus.shards if shard.num_rows])
    _refuse_taken(corpus, settings.format)
    examples = is_example(settings.format)
    return merged_schema(corpus, added_columns(settings), without_layout=examples)


def merged_schema(corpus: Corpus, added: pa.Schema, *, without_layout: bool = False) -> pa.Schema:
    """One schema for rows of all shards: the input's columns, then `added`.

    With `without_layout`, columns that hold a shard's samples are left out: what is such a column
    in one shard may be any other in the next.

    Shards may differ: the output has every column that any shard has, in order of first
    appearance, null where a shard lacks it; a column's types are widened (int32 and int64, int64
    and double, null and anything), and a value that the common type cannot hold ends the writing.
    JSON has no types of its own: scalars that differ over ingested pieces become text. Codes of
    dictionaries become int32, because each shard has values of its own. Shards without rows say
    nothing.

    Raises:
        InputError: A column has types that do not go together, or a reserved name.
    """
    shards = [shard for shard in corpus.shards if shard.num_rows]
    merged: dict[str, pa.DataType] = {}
    owner: dict[str, Shard] = {}
    for shard in shards:
        left_out = {BAD_LINE, *(shard.columns.names.values() if without_layout else ())}
        for column in shard.schema:
            if column.name in added.names:
                raise InputError(
                    f"shard {shard.url}: column '{column.name}' has a name that the output needs "
                    f"({', '.join(added.names)}). Rename it in the input."
                )
            if column.name in left_out:
                continue
            first = owner.setdefault(column.name, shard)
            known, kind = merged.get(column.name, pa.null()), _written(column.type)
            widened = _widen(known, kind)
            if widened is None and first.ingested and shard.ingested:
                nested = pa.types.is_nested(known) or pa.types.is_nested(kind)
                widened = None if nested else pa.string()
            if widened is None and first is shard:
                raise InputError(
                    f"column '{column.name}' of shard {shard.url} has type {kind}, which cannot be "
                    "written together with other shards. Convert it in the input."
                )
            if widened is None:
                raise InputError(
                    f"column '{column.name}': {known} in shard {first.url}, {kind} in "
                    f"shard {shard.url}. Convert one of them, or run the shards as two corpora."
                )
            merged[column.name] = widened
    return pa.schema([*merged.items(), *added])


def _refuse_taken(corpus: Corpus, form: Format) -> None:
    taken = set(example_keys(corpus, form))
    for shard in corpus.shards:
        own = set(shard.columns.names.values())
        if clash := [name for name in shard.schema.names if name in taken - own]:
            raise InputError(
                f"shard {shard.url}: column '{clash[0]}' is no part of layout "
                f"{shard.columns.layout}, and select.format: {form} puts something else under this "
                "name. Rename the column, or set select.format: jsonl."
            )


def _check_group_by(name: str, shards: list[Shard]) -> None:
    columns = dict.fromkeys(column.name for shard in shards for column in shard.schema)
    columns.pop(BAD_LINE, None)
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else "Name one of these, or null."
        raise ConfigError(
            f"key 'select.group_by': no shard has a column '{name}' (they have: "
            f"{', '.join(columns)}). {hint}"
        )
    for shard in shards:
        if name in shard.schema.names:
            kind = shard.schema.field(name).type
            values = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not _is_any(values, _GROUPS):
                raise ConfigError(
                    f"key 'select.group_by': column '{name}' has type {kind} in shard {shard.url}, "
                    "expected text, whole numbers or true and false. Name another column, or add "
                    "one to the input."
                )


def _written(kind: pa.DataType) -> pa.DataType:
    """A column's type as it can be put together from many shards.

    Dictionaries get codes with room for the values of all of them; views, for which pyarrow lacks
    `take`, become what they are views of; fields inside may be null. Views of lists stay, and are
    refused: pyarrow 26 casts them to lists whose offsets are too few.
    """
    if pa.types.is_dictionary(kind):
        return pa.dictionary(pa.int32(), _written(kind.value_type), kind.ordered)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([_written_field(field) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_written_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_written_field(kind.value_field))
    return kind


def _written_field(field: pa.Field) -> pa.Field:
    """Never required: a shard may lack the column that it is part of."""
    return field.with_type(_written(field.type)).with_nullable(True)


def _is_any(kind: pa.DataType, tests: tuple[str, ...]) -> bool:
    return any(getattr(pa.types, test)(kind) for test in tests)


def _widen(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The common type of two, if there is one and both can be cast to it."""
    for kind, beside in ((one, other), (other, one)):  # categories beside what is none
        if pa.types.is_dictionary(kind) and not _is_any(beside, ("is_dictionary", "is_null")):
            return _widen(kind.value_type, beside)
    if any(_is_any(a, _TEXT) and _is_any(b, _BYTES) for a, b in ((one, other), (other, one))):
        return None  # pyarrow would make bytes of the text
    both = [pa.schema([("column", kind)]) for kind in (one, other)]
    try:
        common = pa.unify_schemas(both, promote_options="permissive").field("column").type
        for kind in (one, other):  # int64 and decimal(20, 2) widen to what no int64 can become
            pa.nulls(1, kind).cast(common)
    # Not ArrowException, which they all are: so is running out of memory, and it says nothing here.
    except (pa.ArrowTypeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    # Of a decimal and a double, also inside others, pyarrow makes a double: it would round.
    if any(str(common).count("decimal") < str(kind).count("decimal") for kind in (one, other)):
        return None
    return common
