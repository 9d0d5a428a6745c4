"""A tokenizer's chat template: a conversation as text, and where in it the answers are.

The marker of an answer begins where the render of the messages before it ends, and the answer where
a stand-in put in its place does. A template that leaves out or alters what it is given makes a row
malformed::

    before   <|user|>one<|end|>
    head     <|user|>one<|end|><|assistant|>          with the generation prompt
    whole    <|user|>one<|end|><|assistant|> two      some put a space, or an empty thought, first
                               ^ marker      ^ start
"""

import copy
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

_VERSION = 2
"""Of the way answers are found, for the fingerprint of scores."""


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
        return f"{self._template}{tokens}{_VERSION}"

    def render(self, messages: tuple[Message, ...]) -> tuple[str, list[TextTurn]]:
        """Render messages, and find the answers that have content and something before them.

        Raises:
            MalformedSampleError: The reason: template, tool_call or no_instruction.
        """
        chat = chat_messages(messages)
        whole = self._apply(chat)
        roles = [message["role"] for message in chat]
        answers = [
            index
            for index, message in enumerate(chat)
            # One that opens the conversation answers nobody: it is context.
            if "user" in roles[:index]
            and roles[index] == "assistant"
            and message["content"].strip()
        ]
        if not answers:
            raise MalformedSampleError("no_instruction")
        self._refuse_left_out(chat, answers)
        turns = []
        for index, start in self._begins(chat, answers, whole).items():
            before = self._apply(chat[:index])
            head = self._apply(chat[:index], prompt=True)
            if not head.startswith(before):  # some end a chat that is over as a text ends
                before = before.removesuffix(str(self._tokenizer.eos_token or ""))
            if not (head.startswith(before) and whole.startswith(head) and len(head) <= start):
                raise MalformedSampleError("template")
            turns.append(TextTurn(len(before), start, start + len(chat[index]["content"])))
        return whole, turns

    def _refuse_left_out(self, chat: list[dict[str, Any]], answers: list[int]) -> None:
        """See to it that every call of a tool, and every message that is no answer, is rendered.

        Its text may stand in another message as well, a stand-in does not.
        """
        marked = [_with_calls_stood_in(message, index) for index, message in enumerate(chat)]
        calls = [call["name"] for message in marked for call in _calls(message)]
        context = [i for i, m in enumerate(chat) if i not in answers and m["content"].strip()]
        try:
            render = self._apply(_with_stand_ins(marked, context))
        except MalformedSampleError:
            return  # it is particular about what it is given, and takes what there is
        if not all(name in render for name in calls):
            raise MalformedSampleError("tool_call")
        if not all(_stand_in(index) in render for index in context):
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


def _with_calls_stood_in(message: dict[str, Any], index: int) -> dict[str, Any]:
    """The same calls of tools that have other names."""
    if not _calls(message):
        return message
    marked = {**message, "tool_calls": [copy.deepcopy(call) for call in message["tool_calls"]]}
    for number, call in enumerate(_calls(marked)):
        call["name"] = _stand_in(index, number)
    return marked


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """What has a name and arguments, in OpenAI's calls or without the wrapping."""
    calls = message.get("tool_calls", [])
    if isinstance(calls, list):
        calls = [isinstance(call, dict) and (call.get("function") or call) for call in calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise MalformedSampleError("tool_call")
    return calls


def _stand_in(*place: int) -> str:
    """A word in the place of another, that few templates have a reason to alter."""
    return f"CherryStandsIn{'x'.join(map(str, place))}Here"
