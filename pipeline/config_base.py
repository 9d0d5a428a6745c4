"""What all sections of the config have in common."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

Layout = Literal["alpaca", "prompt_completion", "messages", "sharegpt"]
ColumnField = Literal[
    "instruction", "input", "response", "system", "history", "prompt", "messages", "conversations"
]
OPTIONAL_FIELDS = frozenset({"input", "system", "history"})


def _may_be_left_out(
    columns: dict[ColumnField, str | None],
) -> dict[ColumnField, str | None]:
    for field, name in columns.items():
        if name is None and field not in OPTIONAL_FIELDS:
            raise ValueError(
                f"null for {field} leaves out a column that a row needs. Name the column, or take "
                f"{field} out of the map"
            )
    return columns


ColumnMap = Annotated[dict[ColumnField, str | None], AfterValidator(_may_be_left_out)]
"""Field -> column; null leaves an optional field out."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, and nothing changes after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
