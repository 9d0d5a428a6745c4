"""A tokenizer's chat template: a conversation as text, and where in it the answers are.

What a template prints before an answer is found by rendering the messages before it; a template
that cannot be relied on, because it leaves out or alters what it is given, makes a row malformed::

    before   <|user|>one<|end|>
    head     <|user|>one<|end|><|assistant|>          with the generation prompt
    whole    <|user|>one<|end|><|assistant|> two      some put a space, or an empty thought, first
                               ^ marker      ^ start
"""

from typing import TYPE_CHECKING, Any

import jinja2

from pipeline.errors import ModelError
from pipeline.samples import MalformedSampleError, Message
from pipeline.templates import TextTurn, chat_messages

if TYPE_CHECKING:  # rendering.py says why
    from transformers import PreTrainedTokenizerBase

# Templates may print today's date; a score must not depend on the day it was computed. Jinja takes
# the newline away, and what follows is the beginning of a line, as it is without the macro.
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"


class ChatTemplate:
    """The chat template of a tokenizer; of several, the one named `default`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Find it.

        Raises:
            ModelError: There is none.
        """
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        if not template:
            raise ModelError(
                f"tokenizer of {tokenizer.name_or_path}: it has no chat template, which preset or "
                "template 'chat' needs. A base model scores best under score.preset: cherry."
            )
        self._template = str(template)

    @property
    def text(self) -> str:
        """Everything of it that can change a score."""
        # Templates print special tokens by name.
        tokens = sorted((k, str(v)) for k, v in self._tokenizer.special_tokens_map.items())
        return f"{self._template}{tokens}"

    def render(self, messages: tuple[Message, ...]) -> tuple[str, list[TextTurn]]:
        """Render messages, and find the answers that have content and something before them.

        Raises:
            MalformedSampleError: The reason: template, tool_call or no_instruction.
        """
        chat = chat_messages(messages)
        whole = self._apply(chat)
        self._refuse_left_out(chat, whole)
        answers = [
            index
            for index, message in enumerate(chat)
            # An opening answer follows nothing: it is context.
            if index and message["role"] == "assistant" and message["content"].strip()
        ]
        if not answers:
            raise MalformedSampleError("no_instruction")
        turns = []
        begins: dict[int, int] = {}
        for index in answers:
            content = chat[index]["content"]
            # Some end a chat that is over with the token that ends a text.
            before = self._apply(chat[:index]).removesuffix(self._tokenizer.eos_token or "")
            head = self._apply(chat[:index], prompt=True)
            if not (head.startswith(before) and whole.startswith(head)):
                raise MalformedSampleError("template")
            start = len(head)
            if not whole.startswith(content, start):
                begins = begins or self._begins(chat, answers, whole)
                start = begins[index]
            turns.append(TextTurn(len(before), start, start + len(content)))
        return whole, turns

    def _refuse_left_out(self, chat: list[dict[str, Any]], whole: str) -> None:
        """See to it that what is no answer is in the render, and so is every tool call."""
        if any("tool_calls" in m for m in chat):
            silent = [{k: v for k, v in m.items() if k != "tool_calls"} for m in chat]
            if self._apply(silent) == whole:
                raise MalformedSampleError("tool_call")
        asked = [i for i, m in enumerate(chat) if m["role"] != "assistant" and m["content"].strip()]
        # Its text may stand in another message as well, a stand-in does not.
        marked = self._apply(_with_stand_ins(chat, asked))
        if not all(_stand_in(index) in marked for index in asked):
            raise MalformedSampleError("template")

    def _begins(self, chat: list[dict[str, Any]], answers: list[int], whole: str) -> dict[int, int]:
        """Where each answer begins in a render: there where a stand-in for it does.

        With the answers put in place of their stand-ins it must be the whole render again, or the
        template alters one of them.
        """
        rest = self._apply(_with_stand_ins(chat, answers))
        text = ""
        begins = {}
        for index in answers:
            before, _, rest = rest.partition(_stand_in(index))
            text += before
            begins[index] = len(text)
            text += chat[index]["content"]
        if text + rest != whole:
            raise MalformedSampleError("template")
        return begins

    def _apply(self, chat: list[dict[str, Any]], *, prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    chat_template=f"{_FIXED_DATE}{self._template}",
                )
            )
        # What a template does with a chat it was not written for: raise_exception, a missing
        # key, messages[1] of a single one, or string operations on what is no string.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as err:
            raise MalformedSampleError("template") from err


def _with_stand_ins(chat: list[dict[str, Any]], indices: list[int]) -> list[dict[str, Any]]:
    return [
        {**message, "content": _stand_in(index)} if index in indices else message
        for index, message in enumerate(chat)
    ]


def _stand_in(index: int) -> str:
    """A word in the place of a message; no template has a reason to alter it."""
    return f"CherryStandsIn{index}Here"
