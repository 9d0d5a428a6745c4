"""What all sections of the config have in common."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Layout = Literal["alpaca", "prompt_completion", "messages", "sharegpt"]
ColumnField = Literal[
    "instruction", "input", "response", "system", "history", "prompt", "messages", "conversations"
]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, and nothing changes after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
