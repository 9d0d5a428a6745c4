"""Templates: what is put around a prompt and its response, and where the response then is.

Text templates are the ones of the published programs. Spans follow from the lengths of what is put
together; nothing is ever searched for in a render.
"""

from dataclasses import dataclass, field
from typing import Any

from pipeline.config import TemplateName
from pipeline.samples import MalformedSampleError, Message


@dataclass(frozen=True)
class TextTemplate:
    """A prompt template that is plain text. Each prompt ends with the marker."""

    with_input: str
    without_input: str
    marker: str = ""
    system: str = ""
    """Default of `{system}`; a sample's own system message replaces it. A template without
    `{system}` puts such a message before the instruction, a blank line between."""
    next_turn: str | None = None
    """How a further turn follows a response; None: the template has single turns only."""
    # Kept out of repr, so that templates of single turns keep their fingerprint.
    next_turn_with_input: str | None = field(default=None, repr=False)


_ALPACA_TAIL = (
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}"
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
TEXT_TEMPLATES: dict[TemplateName, TextTemplate] = {
    "alpaca": TextTemplate(
        with_input="Below is an instruction that describes a task, paired with an input that "
        "provides further context. " + _ALPACA_TAIL + "\n\n### Input:\n{input}\n\n### Response:",
        without_input="Below is an instruction that describes a task. "
        + _ALPACA_TAIL
        + "\n\n### Response:",
        marker="### Response:",
    ),
    "wizardlm": TextTemplate(
        with_input="{instruction}\n{input}\n\n### Response:",
        without_input="{instruction}\n\n### Response:",
        marker="### Response:",
    ),
    # Cherry_LLM's Vicuna prompt. Its direct side starts with 'ASSISTANT:', which inside the prompt
    # shares its first token with the space before it; here the direct side keeps that token.
    "vicuna": TextTemplate(
        with_input="{system} USER: {instruction}\nInput:\n{input} ASSISTANT:",
        without_input="{system} USER: {instruction} ASSISTANT:",
        marker="ASSISTANT:",
        system=_VICUNA_SYSTEM,
        next_turn="{eos}USER: {instruction} ASSISTANT:",
        next_turn_with_input="{eos}USER: {instruction}\nInput:\n{input} ASSISTANT:",
    ),
    "plain": TextTemplate(
        with_input="{instruction}\n{input}\n",
        without_input="{instruction}\n",
    ),
}


@dataclass(frozen=True)
class TextTurn:
    """Character offsets of one assistant turn in a render."""

    marker: int
    start: int
    end: int


def until_last_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages up to the last answer with content; empty if there is none."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant" and messages[index].content.strip():
            return messages[: index + 1]
    return ()


def render_text(
    template: TextTemplate, messages: tuple[Message, ...], eos: str
) -> tuple[str, list[TextTurn]]:
    """Render under a text template; spans follow from the lengths of what is put together.

    Raises:
        MalformedSampleError: The reason for `malformed`: tool_call, multi_turn or turn_order.
    """
    if any(m.role == "tool" or "tool_calls" in m.extra for m in messages):
        raise MalformedSampleError("tool_call")
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    rest = [m for m in messages if m.role != "system"]
    text = ""
    turns: list[TextTurn] = []
    while rest:
        if text and template.next_turn is None:
            raise MalformedSampleError("multi_turn")
        roles = [m.role for m in rest[:3]]
        if roles[:2] == ["user", "assistant"]:
            (user, answer), extra = rest[:2], None
        elif roles == ["user", "input", "assistant"]:
            user, extra, answer = rest[:3]
        else:
            raise MalformedSampleError("multi_turn" if template.next_turn is None else "turn_order")
        rest = rest[2 if extra is None else 3 :]
        if text:
            pattern = template.next_turn if extra is None else template.next_turn_with_input
        else:
            pattern = template.without_input if extra is None else template.with_input
        instruction = user.content
        if system and not template.system:  # such a template has single turns
            instruction = f"{system}\n\n{instruction}"
        # str.format reads fields from the template only: braces in a content stay braces.
        text += str(pattern).format(
            system=system or template.system,
            eos=eos,
            instruction=instruction,
            input="" if extra is None else extra.content,
        )
        start = len(text)
        text += answer.content
        if answer.content.strip():
            turns.append(TextTurn(start - len(template.marker), start, len(text)))
    return text, turns


def chat_messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Messages as chat templates take them; an Alpaca input joins its instruction by a newline."""
    chat: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "input":
            chat[-1]["content"] += "\n" + message.content
        else:
            chat.append({"role": message.role, "content": message.content, **message.extra})
    return chat
