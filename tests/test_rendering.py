"""Spans, checked against what the tokens decode to."""

from typing import Any

import pytest
from conftest import CHATML, make_tokenizer

from pipeline.chat_template import ChatTemplate
from pipeline.config import TemplateName
from pipeline.errors import ModelError
from pipeline.rendering import (
    ENDING_TOKENS,
    RenderedSample,
    Renderer,
    TokenTurn,
    exact_offsets_backend,
    prefix_token_ids,
)
from pipeline.samples import Message, Sample
from pipeline.templates import TEXT_TEMPLATES

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


def sample(*turns: tuple[str, str]) -> Sample:
    return Sample(tuple(Message(role, content) for role, content in turns))


def alpaca(instruction: str, response: str, extra: str = "") -> Sample:
    middle = [("input", extra)] if extra else []
    return sample(("user", instruction), *middle, ("assistant", response))


def render(
    sample: Sample, template: str = "alpaca", *, max_length: int = 512, pair: bool = True, **kind
) -> tuple[RenderedSample, Renderer]:
    tokenizer = make_tokenizer(**{"chat_template": CHATML, **kind})
    renderer = Renderer(tokenizer, template, max_length, pair)
    (result,) = renderer([sample])
    return result, renderer


def text(renderer: Renderer, ids: list[int]) -> str:
    return renderer.tokenizer.decode(ids)


def spans(result: RenderedSample, renderer: Renderer) -> list[tuple[str, str]]:
    """(what is scored, what the direct pass sees after the prefix) for each turn."""
    return [
        (
            text(renderer, result.input_ids[t.conditioned_start : t.end]),
            text(renderer, result.input_ids[t.direct_start : t.end]),
        )
        for t in result.turns
    ]


def test_of_several_chat_templates_the_default_is_taken() -> None:
    named = {"default": CHATML, "tool_use": "no such thing"}
    expected, _ = render(alpaca("Add.", "Three."), "chat")
    found, renderer = render(alpaca("Add.", "Three."), "chat", chat_template=named)
    assert found == expected
    assert CHATML in renderer.template_text
    with pytest.raises(ModelError, match="no chat template"):
        render(alpaca("Add.", "Three."), "chat", chat_template={"tool_use": CHATML})


def test_alpaca_prompt_is_the_reference_programs_text() -> None:
    result, renderer = render(alpaca("Add.", "Three.", extra="1 and 2"))
    assert text(renderer, result.input_ids) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add.\n\n### Input:\n1 and 2\n\n### Response:Three."
    )
    assert spans(result, renderer) == [("Three.", "### Response:Three.")]


@pytest.mark.parametrize(
    ("template", "extra", "expected"),
    [
        ("alpaca", "", "Below is an instruction that describes a task. Write a response that "
         "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:Three."),
        ("wizardlm", "", "Add.\n\n### Response:Three."),
        ("wizardlm", "1, 2", "Add.\n1, 2\n\n### Response:Three."),
        ("plain", "", "Add.\nThree."),
        ("plain", "1, 2", "Add.\n1, 2\nThree."),
        ("vicuna", "", VICUNA + " USER: Add. ASSISTANT:Three."),
        ("vicuna", "1, 2", VICUNA + " USER: Add.\nInput:\n1, 2 ASSISTANT:Three."),
        ("chat", "1, 2", "<|im_start|>user\nAdd.\n1, 2<|im_end|>\n<|im_start|>assistant\nThree."),
    ],
)  # fmt: skip
def test_every_template_s_text(template: str, extra: str, expected: str) -> None:
    result, renderer = render(alpaca("Add.", "Three.", extra), template)
    assert text(renderer, result.input_ids) == expected
    assert spans(result, renderer)[0][0] == "Three." if template != "plain" else "hree."


def test_bos_is_what_the_tokenizer_prepends_not_what_it_has() -> None:
    for bos, prefix in ((False, ()), (True, (0,))):
        tokenizer = make_tokenizer(bos=bos)
        assert tokenizer.bos_token == "<s>"
        assert prefix_token_ids(exact_offsets_backend(tokenizer)) == prefix
        result, _ = render(alpaca("Add.", "Three."), bos=bos)
        assert tuple(result.input_ids[:1]) == (prefix or (result.input_ids[0],))
        assert (result.input_ids[0] == 0) == bos


def test_a_row_that_begins_with_bos_as_text_gets_the_real_one_too() -> None:
    result, _ = render(alpaca("<s> is a token.", "True."), "wizardlm", bos=True)
    assert list(result.input_ids[:2]) == [0, 0]


def test_chat_render_that_holds_bos_gets_no_second_one() -> None:
    result, _ = render(alpaca("Add.", "Three."), "chat", bos=True, chat_template="<s>" + CHATML)
    assert list(result.input_ids[:2]).count(0) == 1
    bare, _ = render(alpaca("Add.", "Three."), "chat", bos=True)
    assert list(bare.input_ids) == list(result.input_ids)
    assert bare.turns == result.turns


def test_markerless_without_bos_pairs_by_leaving_the_first_token_out() -> None:
    paired, renderer = render(alpaca("Add.", "one two three"), "plain")
    unpaired, _ = render(alpaca("Add.", "one two three"), "plain", pair=False)
    (p,), (u,) = paired.turns, unpaired.turns
    assert (u.num_conditioned, u.num_direct) == (3, 2)
    assert (p.num_conditioned, p.num_direct) == (2, 2)
    assert p.direct_start == u.direct_start == u.conditioned_start
    assert text(renderer, paired.input_ids[p.conditioned_start : p.end]) == " two three"


def test_markerless_with_bos_scores_every_token_on_both_sides() -> None:
    result, _ = render(alpaca("Add.", "one two three"), "plain", bos=True)
    assert (result.turns[0].num_conditioned, result.turns[0].num_direct) == (3, 3)


def test_straddling_token_is_context_on_both_sides() -> None:
    # ':' and '-' merge: the response ':-' begins inside the token ' :-' or ':-'.
    tokenizer = make_tokenizer()
    assert len(tokenizer.encode(":-")) == 1, "the merge this test is about"
    renderer = Renderer(tokenizer, "alpaca", 512, True)
    (result,) = renderer([alpaca("Draw.", "- two three")])
    (turn,) = result.turns
    assert text(renderer, result.input_ids[turn.conditioned_start : turn.end]) == " two three"
    assert text(renderer, result.input_ids[turn.direct_start : turn.end]) == (
        "### Response:- two three"
    )


def test_trimmed_offsets_do_not_make_a_straddling_token_response() -> None:
    # The prompt ends in a space that merges with 'the': ' the' straddles, whatever is claimed.
    spaced = (
        "{{ messages[0]['content'] }}"
        "{% if add_generation_prompt or messages|length > 1 %} {% endif %}"
        "{% if messages|length > 1 %}{{ messages[1]['content'] }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=spaced)
    assert len(tokenizer.encode(" the")) == 1
    # Unpaired: pairing would leave the token out for want of a context on the direct side.
    renderer = Renderer(tokenizer, "chat", 512, pair_tokens=False)
    (result,) = renderer([alpaca("Draw.", "the sea")])
    (turn,) = result.turns
    assert text(renderer, result.input_ids[turn.conditioned_start : turn.end]) == " sea"


def test_multibyte_characters_split_over_tokens_are_scored_whole() -> None:
    result, renderer = render(alpaca("Grüße?", "漢字 🙂 ok"))
    assert spans(result, renderer)[0][0] == "漢字 🙂 ok"


def test_multi_turn_chat_scores_every_assistant_turn_once() -> None:
    chat = sample(
        ("system", "Be brief."), ("user", "one"), ("assistant", "two"),
        ("user", "three"), ("assistant", "four five"), ("user", "six"),
    )  # fmt: skip
    result, renderer = render(chat, "chat")
    assert spans(result, renderer) == [
        ("two", "<|im_start|>assistant\ntwo"),
        ("four five", "<|im_start|>assistant\nfour five"),
    ]
    assert "six" not in text(renderer, result.input_ids)  # only up to the last answer


def test_vicuna_defines_turns_and_alpaca_does_not() -> None:
    chat = sample(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    result, renderer = render(chat, "vicuna")
    assert text(renderer, result.input_ids).endswith(
        "USER: a ASSISTANT:one</s>USER: b ASSISTANT:two"
    )
    assert [scored for scored, _ in spans(result, renderer)] == ["one", "two"]
    assert render(chat, "alpaca")[0].reason == "multi_turn"


def test_every_turn_of_vicuna_has_its_input() -> None:
    chat = sample(
        ("user", "a"), ("assistant", "one"), ("user", "b"), ("input", "c"), ("assistant", "two")
    )
    result, renderer = render(chat, "vicuna")
    assert text(renderer, result.input_ids).endswith("</s>USER: b\nInput:\nc ASSISTANT:two")
    assert [scored for scored, _ in spans(result, renderer)] == ["one", "two"]


def test_own_system_message() -> None:
    chat = sample(("system", "Be brief."), ("user", "a"), ("assistant", "one two"))
    result, renderer = render(chat, "vicuna")
    assert text(renderer, result.input_ids) == "Be brief. USER: a ASSISTANT:one two"
    result, renderer = render(chat, "plain")
    assert text(renderer, result.input_ids) == "Be brief.\n\na\none two"


def test_truncation_cuts_right_and_keeps_both_sides_equal() -> None:
    long = alpaca("Add.", "one two three four five six seven")
    whole, _ = render(long)
    cut, renderer = render(long, max_length=whole.turns[0].conditioned_start + 3)
    assert cut.truncated
    assert not whole.truncated
    assert spans(cut, renderer) == [("one two three", "### Response:one two three")]
    assert (cut.turns[0].num_conditioned, cut.turns[0].num_direct) == (3, 3)


def test_a_row_of_millions_of_tokens_is_cut_before_python_sees_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    find = Renderer._find_spans

    def note(self: Renderer, ids: list[int], *given: Any) -> RenderedSample:
        seen.append(len(ids))
        return find(self, ids, *given)

    monkeypatch.setattr(Renderer, "_find_spans", note)
    long = alpaca("Add.", "one two three " * 1000)
    whole, _ = render(long, max_length=10_000)
    cut, _ = render(long, max_length=200)
    assert seen[0] > 3000
    assert seen[1] < 210
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:200]
    assert cut.next_ids == tuple(whole.input_ids[200 : 200 + len(cut.next_ids)])
    assert len(cut.next_ids) == ENDING_TOKENS
    unread = alpaca("Add. " * 1000, "one")
    assert render(unread, max_length=200)[0].status == "prompt_overlong"


def test_truncated_conversation_keeps_the_turns_that_fit() -> None:
    chat = sample(("user", "a"), ("assistant", "one two"), ("user", "b " * 40), ("assistant", "x"))
    result, _ = render(chat, "chat", max_length=40)
    assert result.status == "ok"
    assert result.truncated
    assert [t.num_conditioned for t in result.turns] == [2, 0]
    assert [t.num_direct for t in result.turns] == [2, 0]


@pytest.mark.parametrize(
    ("row", "template", "max_length", "status"),
    [
        (alpaca("Add.", ""), "alpaca", 512, "empty_response"),
        (alpaca("Add.", " \n"), "alpaca", 512, "empty_response"),
        (sample(("user", "Hello?")), "chat", 512, "empty_response"),
        (alpaca("Add.", "one"), "plain", 512, "too_short"),
        (alpaca("Add. " * 200, "one two"), "alpaca", 64, "prompt_overlong"),
        (Sample(malformed="null_prompt"), "alpaca", 64, "malformed"),
    ],
)
def test_statuses(row: Sample, template: str, max_length: int, status: str) -> None:
    result, _ = render(row, template, max_length=max_length)
    assert result.status == status
    assert not result.turns


@pytest.mark.parametrize("pair", [True, False])
def test_no_answer_is_too_short_where_it_is_not_scored_alone(pair: bool) -> None:
    renderer = Renderer(make_tokenizer(), "plain", 512, pair_tokens=pair, direct=False)
    (result,) = renderer([alpaca("Add.", "one")])
    assert result.status == "ok"
    assert [t.num_conditioned for t in result.turns] == [1]


def test_whitespace_that_the_template_strips_is_malformed_not_misplaced() -> None:
    stripping = CHATML.replace("m['content']", "m['content'] | trim")
    padded = alpaca("Add.", " three ")
    assert render(padded, "chat", chat_template=stripping)[0].reason == "template"
    assert render(padded, "chat")[0].status == "ok"


def test_template_that_refuses_or_fails_is_malformed() -> None:
    for template in (
        "{{ raise_exception('no') }}",
        "{{ messages[9]['content'] + 1 }}",
        "{{ messages[0]['content'] + 1 }}",
    ):
        result, _ = render(alpaca("Add.", "one"), "chat", chat_template=template)
        assert (result.status, result.reason) == ("malformed", "template")


def test_generation_prompt_that_is_no_prefix_is_malformed() -> None:
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    assert render(alpaca("A", "b"), "chat", chat_template=thinking)[0].reason == "template"


def test_an_answer_that_begins_within_the_generation_prompt_is_malformed() -> None:
    """A part of it is given: what is scored would not be what the model is asked for."""
    opening = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    thought = alpaca("A", "<think>so</think>b")
    assert render(thought, "chat", chat_template=opening)[0].reason == "template"


# What widely used templates put around messages, and what of it is theirs before an answer.
_QWEN3 = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}",
)
_PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
_DEEPSEEK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}User: {{ m['content'] }}\n\n"
    "{% else %}Assistant: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "direct"),
    [
        (_QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n(four) five"),
        (_PHI3, "<|assistant|>\n(four) five"),
        (_INST, " (four) five"),
        (_DEEPSEEK, "Assistant: (four) five"),
        (_LLAMA3, "<|assistant|>\n\n(four) five"),  # the user's end of turn is not its own
    ],
    ids=["qwen3", "phi3", "inst", "deepseek", "llama3"],
)
def test_what_a_template_puts_before_an_answer_is_its_own(template: str, direct: str) -> None:
    """The last turn's answer does not begin where the generation prompt ends, or ends the chat."""
    chat = sample(
        ("user", "one"), ("assistant", "(two)"), ("user", "three"), ("assistant", "(four) five")
    )
    result, renderer = render(chat, "chat", chat_template=template, pair=False)
    assert result.status == "ok"
    scored, seen = spans(result, renderer)[1]
    assert seen == direct
    # Where a space before it has become a part of its first token, that one is context.
    assert scored in ("(four) five", "four) five")
    assert len(result.turns) == 2


@pytest.mark.parametrize("answer", ["<", "<think>", "<think>\n\n</think>\n\n", "</think>\n\n<"])
def test_an_answer_that_begins_as_the_templates_own_text_is_found(answer: str) -> None:
    messages = (Message("user", "one"), Message("assistant", answer + "two"))
    whole, (turn,) = ChatTemplate(make_tokenizer(chat_template=_QWEN3)).render(messages)
    assert whole[turn.start : turn.end] == answer + "two"
    assert whole[: turn.start].endswith("assistant\n<think>\n\n</think>\n\n")


def test_an_answer_that_a_template_takes_apart_is_malformed() -> None:
    apart = CHATML.replace(
        "{{ m['content'] }}", "<think></think>{{ m['content'].split('</think>')[-1] }}"
    )
    chat = sample(("user", "one"), ("assistant", "<think>so</think>two"))
    assert render(chat, "chat", chat_template=apart)[0].reason == "template"


@pytest.mark.parametrize("before", [(), (("system", "Be brief."),)])
def test_an_opening_answer_is_context(before: tuple[tuple[str, str], ...]) -> None:
    opening = (*before, ("assistant", "Hello, one?"))
    chat = sample(*opening, ("user", "two"), ("assistant", "three four"))
    result, renderer = render(chat, "chat")
    assert spans(result, renderer) == [("three four", "<|im_start|>assistant\nthree four")]
    assert "Hello, one?" in text(renderer, result.input_ids)
    alone, _ = render(sample(*opening), "chat")
    assert (alone.status, alone.reason) == ("malformed", "no_instruction")
    dropping = CHATML.replace("in messages %}", f"in messages[:{len(before)}] + messages[-2:] %}}")
    assert render(chat, "chat", chat_template=dropping)[0].reason == "template"


@pytest.mark.parametrize("role", ["system", "tool", "user"])
def test_a_message_that_the_template_leaves_out_makes_a_row_malformed(role: str) -> None:
    """Its text stands in another message, so that looking for the text would not do."""
    chat = sample(("user", "42"), (role, "42"), ("user", "So?"), ("assistant", "It is 42."))
    assert render(chat, "chat")[0].status == "ok"
    skipping = CHATML.replace(
        "{% for m in messages %}", "{% for m in [messages[0]] + messages[2:] %}"
    )
    assert render(chat, "chat", chat_template=skipping)[0].reason == "template"


def test_a_blank_message_may_be_left_out() -> None:
    without = CHATML.replace("in messages %}", "in messages if m['content'] | trim %}")
    chat = sample(("system", " "), ("user", "one"), ("assistant", "two"))
    assert render(chat, "chat", chat_template=without)[0].status == "ok"


def test_what_ends_a_chat_that_is_over_must_not_lie_within_it() -> None:
    ended = CHATML.replace("{% endif %}", "{% else %}[over]{% endif %}")
    tokenizer = make_tokenizer(chat_template=ended)
    tokenizer.eos_token = None
    (result,) = Renderer(tokenizer, "chat", 512, True)([alpaca("one", "two")])
    assert result.reason == "template"


@pytest.mark.parametrize("lead", ["", "\n", "\n\n", "  ", "   {# said #}\n", "{{ '' }}\n"])
def test_a_template_begins_as_it_does_in_transformers(lead: str) -> None:
    indented = lead + "  {% if true %}\n" + CHATML + "{% endif %}\n"
    tokenizer = make_tokenizer(chat_template=indented)
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "b c"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    rendered, _ = ChatTemplate(tokenizer).render(
        (Message("user", "A"), Message("assistant", "b c"))
    )
    assert rendered == expected


def test_special_tokens_are_split_where_the_tokenizer_splits_them() -> None:
    for split in (False, True):
        tokenizer = make_tokenizer()
        tokenizer.split_special_tokens = split
        expected = tokenizer("two</s> three", add_special_tokens=False).input_ids
        backend = exact_offsets_backend(tokenizer)
        assert backend.encode("two</s> three", add_special_tokens=False).ids == expected


def test_date_in_a_template_is_fixed() -> None:
    dated = "\n{{ strftime_now('%Y-%m-%d') }}" + CHATML
    result, renderer = render(alpaca("A", "b c"), "chat", chat_template=dated)
    assert text(renderer, result.input_ids).startswith("\n26 Jul 2024<|im_start|>")


def test_tool_call_is_context_where_rendered_and_malformed_where_not() -> None:
    calls = {"tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    row = Sample(
        (
            Message("user", "Add."),
            Message("assistant", "", calls),
            Message("tool", "3"),
            Message("assistant", "It is three."),
        )
    )
    rendered = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
    )
    result, renderer = render(row, "chat", chat_template=rendered)
    assert spans(result, renderer)[0][0] == "It is three."
    assert "add" in text(renderer, result.input_ids)
    assert render(row, "chat")[0].reason == "tool_call"
    assert render(row, "alpaca")[0].reason == "tool_call"
    # Without the calls it would refuse the chat: two answers in a row.
    strict = "{% if not messages[1:2] or messages[1].tool_calls %}" + rendered
    strict += "{% else %}{{ raise_exception('roles') }}{% endif %}"
    assert render(row, "chat", chat_template=strict)[0].status == "ok"
    again = Message("assistant", "", {"tool_calls": [*calls["tool_calls"] * 2]})
    twice = Sample((row.messages[0], again, *row.messages[2:]))
    first_only = rendered.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    assert render(twice, "chat", chat_template=rendered)[0].status == "ok"
    assert render(twice, "chat", chat_template=first_only)[0].reason == "tool_call"


@pytest.mark.parametrize("calls", ["text", [1], [{"function": "get"}], [{"function": ["get"]}]])
def test_calls_of_another_form_are_malformed(calls: object) -> None:
    row = Sample((Message("user", "a"), Message("assistant", "b", {"tool_calls": calls})))
    assert render(row, "chat")[0].reason == "tool_call"


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        Renderer(make_tokenizer(), "chat", 512, True)


def test_braces_and_template_syntax_in_content_are_text() -> None:
    hostile = "{instruction} {{ 7 * 7 }} {% raise %} {0} %s"
    for template in ("alpaca", "vicuna", "chat"):
        result, renderer = render(alpaca(hostile, hostile), template)
        assert spans(result, renderer)[0][0] == hostile
        assert text(renderer, result.input_ids).count(hostile) == 2


def test_prompt_tokens_do_not_count_the_straddling_or_the_response() -> None:
    result, _ = render(alpaca("Add.", "one two"))
    assert result.num_prompt_tokens == result.turns[0].conditioned_start


def test_empty_answer_within_a_conversation_is_passed_over() -> None:
    chat = sample(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "two"))
    result, _ = render(chat, "chat")
    assert len(result.turns) == 1
    assert isinstance(result.turns[0], TokenTurn)


def test_markers_end_their_prompts() -> None:
    """The span of the marker is computed from its length: it must be the prompt's last text."""
    for template in TEXT_TEMPLATES.values():
        assert template.with_input.endswith(template.marker)
        assert template.without_input.endswith(template.marker)
        assert (template.next_turn or template.marker).endswith(template.marker)


@pytest.mark.parametrize(
    ("template", "changes"), [("chat", True), ("vicuna", True), ("alpaca", False)]
)
def test_the_end_of_a_turn_is_part_of_the_template(template: TemplateName, changes: bool) -> None:
    """A chat template may print it; Vicuna's puts it between turns; Alpaca's has no use for it."""
    texts = set()
    for eos in ("</s>", "<|im_end|>"):
        tokenizer = make_tokenizer(chat_template=CHATML)
        tokenizer.eos_token = eos
        texts.add(Renderer(tokenizer, template, 256, True).template_text)
    assert len(texts) == 1 + changes
