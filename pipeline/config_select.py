"""The config's section on the selection."""

import math
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from pipeline.config_base import Section

Ratio = Literal["ifd_loss_ratio", "ifd_ppl_ratio"]
Order = Literal["descending", "ascending"]
Format = Literal["parquet", "jsonl", "alpaca_jsonl", "messages_jsonl"]

_MOST_ROWS = 10**12


def _share(value: Decimal) -> Decimal:
    if not 0 <= value <= 1:
        raise ValueError("expected a fraction from 0 to 1 (0.10 is ten percent)")
    return value


def _quota(value: Any) -> int | Decimal:
    """A whole number is a count; what has a point, a fraction."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_ROWS:
        return value
    if isinstance(value, float | Decimal) or (isinstance(value, str) and "." in value):
        with suppress(InvalidOperation):
            return _share(Decimal(str(value)))
    raise ValueError("expected a count (100) or a fraction from 0 to 1 with a point (0.1, 1.0)")


def _group(name: Any) -> Any:
    if not isinstance(name, str):
        raise ValueError(f"a group's name is text: put it in quotes, '{name}'")
    return name


_Share = Annotated[Decimal, AfterValidator(_share)]
_Quotas = Annotated[
    Annotated[Literal["each", "proportional"], Tag("name")]
    | Annotated[
        dict[
            Annotated[str, BeforeValidator(_group)],
            Annotated[int | Decimal, BeforeValidator(_quota)],
        ],
        Tag("table"),
    ],
    Discriminator(lambda value: "table" if isinstance(value, dict) else "name"),
]


class SelectConfig(Section):
    """Which scored rows make the cherry subset."""

    by: Ratio | None = None
    """The ratio that ranks. Null is the preset's."""
    order: Order = "descending"
    """Which end ranks first: `descending` the high ratios, as published, or `ascending`."""
    fraction: _Share | None = None
    """Share of `of` rows to keep, taken as an exact decimal. 0.10 if nothing else is said."""
    fractions: Annotated[list[_Share], Field(min_length=1)] | None = None
    """Several shares in one pass: each subset lies within the next, and the manifest says where
    each ends; under quotas each row says the smallest it belongs to."""
    count: Annotated[int, Field(strict=True, ge=0, le=_MOST_ROWS)] | None = None
    """Rows to keep, in place of a fraction."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Keep every eligible row at or over this ratio (ascending: at or under), in place of a
    fraction."""
    of: Literal["all", "scored", "eligible"] = "all"
    """What `fraction` is a share of: all input rows, rows with status ok, or eligible rows."""
    min_ifd: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Rows under it are not eligible."""
    max_ifd: Annotated[float, Field(allow_inf_nan=False)] | None = 1.0
    """Rows at or over it are not eligible: there the instruction does not help at all."""
    min_response_tokens: Annotated[int, Field(ge=1)] = 1
    """Rows with fewer scored response tokens are not eligible."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Of eligible rows with equal content, only the one that ranks first can be selected."""
    group_by: Annotated[str, Field(min_length=1)] | None = None
    """A column of the input (source, language, task): its values are groups with quotas of their
    own, null is one of them."""
    quotas: _Quotas = "each"
    """`each`: the fraction or count holds for every group. `proportional`: it holds for all rows
    together and is dealt out by the groups' sizes. Or a table of counts (whole numbers) and
    fractions (with a point) by group, `'*'` for those not named, `'null'` for null."""
    floor: Annotated[int, Field(strict=True, ge=0, le=_MOST_ROWS)] = 0
    """`proportional`: rows that each group gets at least, as far as it has so many."""
    format: Format = "parquet"
    """Of the subset. `jsonl` has the input's own columns, `alpaca_jsonl` and `messages_jsonl` what
    trainers read."""
    rows_per_part: Annotated[int, Field(gt=0)] = 50_000
    """Rows of one output file."""

    @model_validator(mode="after")
    def _one_budget(self) -> "SelectConfig":
        names = ("fraction", "fractions", "count", "threshold")
        given = [name for name in names if getattr(self, name) is not None]
        if isinstance(self.quotas, dict):
            given.append("a table of quotas")
            if not self.quotas:
                raise ValueError("the table of quotas is empty: name groups, or '*' for all")
        if len(given) > 1:
            raise ValueError(f"set one of {' and '.join(given)}, and leave the others out (null)")
        if self.quotas != "each" and self.group_by is None:
            raise ValueError("quotas need group_by, the column whose values are the groups")
        if self.quotas == "proportional" and self.threshold is not None:
            raise ValueError("a threshold has no rows to deal out: leave quotas at 'each'")
        if self.floor and self.quotas != "proportional":
            raise ValueError("floor needs quotas: proportional, and group_by")
        return self

    @model_validator(mode="after")
    def _some_row_fits(self) -> "SelectConfig":
        low = -math.inf if self.min_ifd is None else self.min_ifd
        high = math.inf if self.max_ifd is None else self.max_ifd
        if low >= high:
            raise ValueError(f"no row has min_ifd {low:g} <= ratio < max_ifd {high:g}")
        if self.threshold is not None and self.order == "descending" and self.threshold >= high:
            raise ValueError(
                f"no eligible row is at or over the threshold {self.threshold:g}: max_ifd is "
                f"{high:g}. Raise max_ifd, or set it to null"
            )
        if self.threshold is not None and self.order == "ascending" and self.threshold < low:
            raise ValueError(
                f"no eligible row is at or under the threshold {self.threshold:g}: min_ifd is "
                f"{low:g}. Lower min_ifd, or set it to null"
            )
        return self
