"""Rendering: from a canonical sample to token ids and the spans that are scored.

The prompt and the response are tokenised together, once, as training would see them; spans are
found by character offsets, never by searching text or by a second tokenisation::

    text      ...### Response:Paris is the capital.
                 ^ marker     ^ response           ^ end          (characters)
    tokens    ... ###| Response|:|Paris| is| the| capital|.
                 ^ direct_start  ^ start                   ^ end  (token indices)

    conditioned pass   prefix + ids                   scores ids[conditioned_start:end]
    direct pass        prefix + ids[direct_start:end] scores ids[direct_scored_start:end]

`prefix` is what ``tokenizer(text)`` itself puts in front (BOS, for tokenizers that add one). A
token that straddles the response's first character is context and is scored on neither side.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pipeline.chat_template import ChatTemplate
from pipeline.config import TemplateName
from pipeline.errors import ModelError
from pipeline.samples import MalformedSampleError, Message, Sample
from pipeline.templates import (
    TEXT_TEMPLATES,
    TextTurn,
    render_text,
    until_last_answer,
)

if TYPE_CHECKING:  # settings.py names the version below, where nobody waits for transformers
    from transformers import PreTrainedTokenizerBase

RENDERING_VERSION = 1
ENDING_TOKENS = 8
"""Tokens after an answer among which its end is looked for: white space and a special token."""


@dataclass(frozen=True)
class TokenTurn:
    """Token indices of one assistant turn, into `RenderedSample.input_ids`."""

    direct_start: int
    """First token of the direct pass (after the prefix)."""
    conditioned_start: int
    """First token scored in the conditioned pass."""
    direct_scored_start: int
    """First token scored in the direct pass; equal to conditioned_start when paired."""
    end: int
    """One past the last response token."""

    @property
    def num_conditioned(self) -> int:
        """Tokens scored in the conditioned pass."""
        return max(0, self.end - self.conditioned_start)

    @property
    def num_direct(self) -> int:
        """Tokens scored in the direct pass."""
        return max(0, self.end - self.direct_scored_start)


@dataclass(frozen=True)
class RenderedSample:
    """One row, ready for the engine; `input_ids` starts with the prefix."""

    status: str
    reason: str | None = None
    input_ids: tuple[int, ...] | list[int] = ()
    turns: tuple[TokenTurn, ...] = ()
    num_prompt_tokens: int = 0
    truncated: bool = False
    next_ids: tuple[int, ...] = ()
    """What the render has after `input_ids`: the first few tokens, which may end the last turn."""


class Renderer:
    """Renders samples under one template, tokenizer and length limit."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: TemplateName,
        max_length: int,
        pair_tokens: bool,
        *,
        direct: bool = True,
    ) -> None:
        """Prepare the tokenizer.

        Args:
            tokenizer: A fast one.
            template: By name.
            max_length: Tokens of a row.
            pair_tokens: Score the same tokens of an answer with its prompt and alone.
            direct: Answers are scored alone, too: a row needs a token that can be. Where they are
                not, there is nothing to pair either.

        Raises:
            ModelError: The tokenizer has no fast backend, or template is `chat` and it has none.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.pair_tokens = pair_tokens and direct
        self.direct = direct
        self._backend = exact_offsets_backend(tokenizer)
        self.prefix_ids = prefix_token_ids(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._chat = ChatTemplate(tokenizer) if template == "chat" else None

    @property
    def template_text(self) -> str:
        """Everything of the template that can change a score, for the fingerprint."""
        if self._chat:
            return self._chat.text
        template = TEXT_TEMPLATES[self.template]
        further = f"{self.tokenizer.eos_token}{template.next_turn_with_input or ''}"
        return repr(template) + (further if template.next_turn else "")

    def __call__(self, samples: Sequence[Sample]) -> list[RenderedSample]:
        """Render, tokenise and find the scored spans; one result per sample, in order."""
        results: list[RenderedSample | None] = []
        texts: list[str] = []
        pending: list[tuple[int, list[TextTurn]]] = []
        for sample in samples:
            try:
                if sample.malformed is not None:
                    raise MalformedSampleError(sample.malformed)
                messages = until_last_answer(sample.messages)
                if not messages:
                    results.append(RenderedSample("empty_response"))
                    continue
                text, turns = self._render(messages)
            except MalformedSampleError as err:
                results.append(RenderedSample("malformed", reason=str(err)))
                continue
            pending.append((len(results), turns))
            texts.append(text)
            results.append(None)
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        for (index, turns), encoding in zip(pending, encodings, strict=True):
            # Of the rest nothing is asked, and a row may have millions, each some Python objects.
            encoding.truncate(self.max_length + ENDING_TOKENS + 1)
            offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            results[index] = self._find_spans(encoding.ids, offsets, turns)
        return [result for result in results if result is not None]

    def _render(self, messages: tuple[Message, ...]) -> tuple[str, list[TextTurn]]:
        if self._chat:
            return self._chat.render(messages)
        eos = str(self.tokenizer.eos_token or "")
        return render_text(TEXT_TEMPLATES[self.template], messages, eos)

    def _find_spans(
        self, ids: list[int], offsets: npt.NDArray[np.int64], turns: list[TextTurn]
    ) -> RenderedSample:
        num_prefix = len(self.prefix_ids)
        if self._chat and num_prefix and tuple(ids[:num_prefix]) == self.prefix_ids:
            shift = 0  # the chat render holds BOS already; elsewhere it is the row's own text
        else:
            ids = [*self.prefix_ids, *ids]
            shift = num_prefix
        limit = min(len(ids), self.max_length)
        starts, ends = offsets[:, 0], offsets[:, 1]
        found = []
        for turn in turns:
            start = int(np.searchsorted(starts, turn.start, side="left")) + shift
            end = min(int(np.searchsorted(ends, turn.end, side="right")) + shift, limit)
            # The token that holds the marker's first character; with no marker, the first
            # response token (marker == start then, and a straddling token is context there too).
            direct = int(np.searchsorted(ends, turn.marker, side="right")) + shift
            if turn.marker == turn.start:
                direct = start
            found.append(self._token_turn(max(direct, num_prefix), start, end, limit))
        truncated = len(ids) > self.max_length
        num_prompt_tokens = min(int(np.searchsorted(starts, turns[0].start)) + shift, limit)
        answered = [t for t in found if t.num_conditioned or t.num_direct]
        if not answered and truncated:
            return RenderedSample(
                "prompt_overlong", num_prompt_tokens=num_prompt_tokens, truncated=True
            )
        # Superfiltering's unpaired means need a token on each side, paired ones have both or none.
        lacks_direct = self.direct and not any(t.num_direct for t in found)
        if lacks_direct or not any(t.num_conditioned for t in found):
            return RenderedSample("too_short", num_prompt_tokens=num_prompt_tokens)
        end = max(t.end for t in found)
        return RenderedSample(
            "ok",
            input_ids=ids[:end],
            next_ids=tuple(ids[end : end + ENDING_TOKENS]),
            turns=tuple(found),
            num_prompt_tokens=num_prompt_tokens,
            truncated=truncated,
        )

    def _token_turn(self, direct: int, start: int, end: int, limit: int) -> TokenTurn:
        """Leave out what has no loss: the first token of a sequence predicts, nothing predicts it.

        Example, markerless without BOS, response ids [7, 8, 9] at 4: the direct pass is [7, 8, 9]
        and scores 8 and 9; paired, the conditioned pass scores 8 and 9 too.
        """
        start = min(start, limit)
        conditioned_start = max(start, 1)
        has_context = len(self.prefix_ids) + start - direct > 0
        direct_scored_start = start if has_context else start + 1
        if self.pair_tokens:
            conditioned_start = direct_scored_start = max(conditioned_start, direct_scored_start)
        return TokenTurn(min(direct, end), conditioned_start, direct_scored_start, end)


def exact_offsets_backend(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer:
    """The fast tokenizer, with offsets that cover every character.

    Byte-level tokenizers may be saved with `trim_offsets`: a token ' the' then claims to begin
    after its space, and one that straddles the prompt's last space would look like response.

    Raises:
        ModelError: The tokenizer has no fast backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"tokenizer of {tokenizer.name_or_path}: got {type(tokenizer).__name__}, expected one "
            "with a tokenizer.json (a fast tokenizer), which gives character offsets."
        )
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    _untrim(state.get("post_processor"))
    exact = Tokenizer.from_str(json.dumps(state))
    exact.encode_special_tokens = tokenizer.split_special_tokens
    return exact


def _untrim(processor: Any) -> None:
    if isinstance(processor, dict):
        if "trim_offsets" in processor:
            processor["trim_offsets"] = False
        for part in processor.get("processors", []):
            _untrim(part)


def prefix_token_ids(backend: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text: `[BOS]`, or nothing, whatever `bos_token` says."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    raise ModelError(f"tokenizer: its special tokens {full} do not surround its text {bare}.")
