"""Samples: four layouts, one canonical form, identities that hold anywhere."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.layouts import Columns, find_columns
from pipeline.samples import Message, Sample, read_samples, sample_id
from pipeline.schemas import BAD_LINE

TEXT = pa.string()
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))
SHAREGPT = pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))
ALPACA = Columns("alpaca", {"instruction": "instruction", "input": "input", "response": "output"})

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ROLES = st.sampled_from(["system", "user", "input", "assistant", "tool"])
CONVERSATIONS = st.lists(st.builds(Message, ROLES, TEXTS), max_size=4).map(tuple)


def find(schema: pa.Schema, layout: Any = "auto", **mapped: str) -> Columns:
    return find_columns(schema, "s3://c/part-12.parquet", layout, mapped)


def read(table: pa.Table, layout: Any = "auto", **mapped: str) -> list[Sample]:
    return list(read_samples(table, find(table.schema, layout, **mapped)))


def chat(*turns: dict[str, Any], kind: Any = None) -> Sample:
    """The one sample of a messages row."""
    column = pa.array([list(turns)], kind) if kind else pa.array([list(turns)])
    return read(pa.table({"messages": column}))[0]


def says(role: Any, content: Any, **extra: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **extra}


# Layouts


def test_alpaca_row() -> None:
    table = pa.table({"instruction": ["Add."], "input": ["1 2"], "output": ["3"]})
    messages = (Message("user", "Add."), Message("input", "1 2"), Message("assistant", "3"))
    assert read(table) == [Sample(messages)]


@pytest.mark.parametrize("empty", ["", None])
def test_alpaca_input_that_is_empty_is_no_message(empty: str | None) -> None:
    table = pa.table({"instruction": ["Add."], "input": pa.array([empty], TEXT), "output": ["3"]})
    assert read(table) == [Sample((Message("user", "Add."), Message("assistant", "3")))]


def test_alpaca_without_an_input_column() -> None:
    table = pa.table({"instruction": ["Add."], "output": ["3"]})
    assert find(table.schema).names == {"instruction": "instruction", "response": "output"}
    assert read(table) == [Sample((Message("user", "Add."), Message("assistant", "3")))]


def test_prompt_completion_row() -> None:
    table = pa.table({"prompt": ["Hi"], "completion": ["Hello"]})
    assert read(table) == [Sample((Message("user", "Hi"), Message("assistant", "Hello")))]


def test_messages_row() -> None:
    sample = chat(says("system", "Be brief."), says("user", "Hi"), says("assistant", "Hello"))
    assert sample.messages == (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
    )


def test_sharegpt_row() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    table = pa.table({"conversations": pa.array([turns], SHAREGPT)})
    assert read(table) == [Sample((Message("user", "Hi"), Message("assistant", "Hello")))]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("system", "system"), ("developer", "system"), ("user", "user"), ("human", "user"),
        ("assistant", "assistant"), ("gpt", "assistant"), ("chatgpt", "assistant"),
        ("model", "assistant"), ("bot", "assistant"), ("tool", "tool"), ("function", "tool"),
        ("observation", "tool"), ("ipython", "tool"),
    ],
)  # fmt: skip
def test_role_names(name: str, role: str) -> None:
    assert [m.role for m in chat(says(name, "x")).messages] == [role]


def test_a_role_that_is_no_text_is_malformed() -> None:
    kind = pa.list_(pa.struct([("role", pa.list_(TEXT)), ("content", TEXT)]))
    assert chat(says(["user"], "a"), kind=kind) == Sample(malformed="role")


@pytest.mark.parametrize("name", ["input", "narrator", "", "User", None])
def test_unknown_role_is_malformed(name: str | None) -> None:
    sample = chat(says("user", "a"), says(name, "x"), kind=MESSAGES)
    assert sample == Sample(malformed="role")


def test_rows_keep_their_order_and_faults_stay_in_their_rows() -> None:
    table = pa.table({"prompt": ["a", None, "c"], "completion": ["1", "2", None]})
    assert read(table) == [
        Sample((Message("user", "a"), Message("assistant", "1"))),
        Sample(malformed="null_prompt"),
        Sample((Message("user", "c"), Message("assistant", ""))),
    ]


# Which layout a shard has

EVERY_COLUMN = {
    "instruction": TEXT, "input": TEXT, "output": TEXT, "prompt": TEXT, "completion": TEXT,
    "conversations": SHAREGPT, "messages": MESSAGES,
}  # fmt: skip


@pytest.mark.parametrize(
    ("without", "found"),
    [
        ([], "messages"),
        (["messages"], "sharegpt"),
        (["messages", "conversations"], "prompt_completion"),
        (["messages", "conversations", "prompt"], "alpaca"),
        (["messages", "conversations", "completion"], "alpaca"),
    ],
)
def test_auto_takes_the_first_layout_that_fits(without: list[str], found: str) -> None:
    # Alphabetical columns: the order is the layouts', not the file's.
    schema = pa.schema([(n, EVERY_COLUMN[n]) for n in sorted(EVERY_COLUMN) if n not in without])
    assert find(schema).layout == found


@pytest.mark.parametrize("layout", ["messages", "sharegpt", "prompt_completion", "alpaca"])
def test_named_layout_wins(layout: str) -> None:
    assert find(pa.schema(list(EVERY_COLUMN.items())), layout).layout == layout


def test_description_names_layout_and_columns() -> None:
    schema = pa.schema([("instruction", TEXT), ("answer", TEXT)])
    said = find(schema, response="answer").describe()
    assert said == "alpaca (instruction=instruction, response=answer)"


def test_other_names_of_a_column() -> None:
    schema = pa.schema([("instruction", TEXT), ("response", TEXT)])
    assert find(schema).names == {"instruction": "instruction", "response": "response"}
    assert find(pa.schema([("conversation", SHAREGPT)])).names == {"conversations": "conversation"}


def test_what_an_instruction_is_about_is_not_left_out() -> None:
    # Dolly's columns: rows scored without their passage would have another difficulty.
    dolly = {"instruction": ["Sum up."], "context": ["Long."], "response": ["L."], "category": [""]}
    messages = (Message("user", "Sum up."), Message("input", "Long."), Message("assistant", "L."))
    assert read(pa.table(dolly)) == [Sample(messages)]
    with pytest.raises(InputError, match=r"'context' has type .*list.*input\.columns\.input=NAME"):
        find(pa.table(dolly | {"context": [["Long."]]}).schema)


@pytest.mark.parametrize(
    ("columns", "field", "other"),
    [
        (["instruction", "output", "response"], "response", "output"),
        (["instruction", "output", "input", "context"], "input", "input"),
        (["prompt", "completion", "response"], "response", "completion"),
    ],
)
def test_two_columns_that_may_be_meant_are_refused(
    columns: list[str], field: str, other: str
) -> None:
    """As of `cat alpaca.jsonl dolly.jsonl`: each row fills one of them, and half were not read."""
    schema = pa.schema([(name, TEXT) for name in columns])
    with pytest.raises(InputError, match=rf"{columns[-1]}'.*input\.columns\.{field}={other}"):
        find(schema)
    assert find(schema, **{field: columns[-1]}).names[field] == columns[-1]


def test_alpaca_rows_have_their_system_and_earlier_turns() -> None:
    """As LLaMA-Factory reads them, and as `select.format: alpaca_jsonl` writes them."""
    rows = pa.table(
        {
            "instruction": ["And in French?", "Hi.", "Hi."],
            "input": ["", None, "there"],
            "output": ["Bonjour.", "Hello.", "Hello."],
            "system": ["Translate.", "", None],
            "history": [[["Good day in German?", "Guten Tag."]], [], None],
        }
    )
    translated = (
        Message("system", "Translate."),
        Message("user", "Good day in German?"),
        Message("assistant", "Guten Tag."),
        Message("user", "And in French?"),
        Message("assistant", "Bonjour."),
    )
    plain = (Message("user", "Hi."), Message("assistant", "Hello."))
    with_input = (plain[0], Message("input", "there"), plain[1])
    assert read(rows) == [Sample(translated), Sample(plain), Sample(with_input)]
    for turn in (["alone"], ["a", None], None, ["a", "b", "c"]):
        odd = pa.table({"instruction": ["x"], "output": ["y"], "history": [[turn]]})
        assert read(odd) == [Sample(malformed="history")]
    for none in ([[]], [None]):
        empty = pa.table({"instruction": ["Hi."], "output": ["Hello."], "history": none})
        assert read(empty) == [Sample(plain)]
    with pytest.raises(
        InputError, match=r"'history' has type .*expected a list of pairs of strings"
    ):
        find(pa.table({"instruction": ["x"], "output": ["y"], "history": [["a", "b"]]}).schema)


def test_an_optional_column_of_another_meaning_is_left_out() -> None:
    schema = pa.schema([("instruction", TEXT), ("output", TEXT), ("system", pa.int64())])
    with pytest.raises(InputError, match=r"'system' has type int64.*system=null leaves it out"):
        find(schema)
    assert find(schema, system=None).names == {"instruction": "instruction", "response": "output"}
    with pytest.raises(InputError, match="no known layout fits"):  # this one is not optional
        find(schema, response=None)
    chats = pa.schema([("messages", MESSAGES), ("prompt", TEXT), ("completion", TEXT)])
    assert find(chats, history=None).layout == "messages"  # of which it is no field


@pytest.mark.parametrize(
    ("column", "keys"), [("conversations", ("from", "value")), ("messages", ("role", "content"))]
)
def test_a_system_column_comes_before_a_conversation_that_has_none(
    column: str, keys: tuple[str, str]
) -> None:
    turns = [("user", "Hi."), ("assistant", "Hello.")]
    said = [dict(zip(keys, turn, strict=True)) for turn in turns]
    own = [dict(zip(keys, ("system", "Be kind."), strict=True)), *said]
    rows = pa.table({column: [said, own, said], "system": ["Be brief.", "Be brief.", ""]})
    found = [[(m.role, m.content) for m in sample.messages] for sample in read(rows)]
    assert found == [[("system", "Be brief."), *turns], [("system", "Be kind."), *turns], turns]


@pytest.mark.parametrize("response", ["completion", "response"])
def test_a_prompt_has_its_system_and_earlier_turns(response: str) -> None:
    columns = {"prompt": ["Hi."], response: ["Hello."], "system": ["Be brief."]}
    said = [("user", "One?"), ("assistant", "Two."), ("user", "Hi."), ("assistant", "Hello.")]
    (sample,) = read(pa.table({**columns, "history": [[["One?", "Two."]]]}))
    assert [(m.role, m.content) for m in sample.messages] == [("system", "Be brief."), *said]


def test_mapped_column_wins_over_its_own_name() -> None:
    schema = pa.schema([("instruction", TEXT), ("output", TEXT), ("answer", TEXT)])
    assert find(schema, response="answer").names["response"] == "answer"


def test_mapped_field_names_the_layout() -> None:
    # Without the map this is Alpaca; a mapped prompt says that it is not.
    schema = pa.schema([("instruction", TEXT), ("output", TEXT), ("response", TEXT)])
    found = find(schema, prompt="instruction")
    assert found == Columns("prompt_completion", {"prompt": "instruction", "response": "response"})


def test_every_mapped_field_counts() -> None:
    # Prompt and completion would fit, but the user said where the instruction is.
    schema = pa.schema([("prompt", TEXT), ("question", TEXT), ("completion", TEXT)])
    found = find(schema, instruction="question", response="completion")
    assert found == Columns("alpaca", {"instruction": "question", "response": "completion"})


def test_mapped_field_that_a_named_layout_lacks_is_refused() -> None:
    schema = pa.schema([("prompt", TEXT), ("question", TEXT), ("completion", TEXT)])
    with pytest.raises(InputError, match="prompt_completion has no field 'instruction'"):
        find(schema, "prompt_completion", instruction="question")


def test_map_of_columns_with_other_names() -> None:
    table = pa.table({"question": ["Hi"], "context": ["x"], "answer": ["Hello"]})
    samples = read(table, instruction="question", input="context", response="answer")
    messages = (Message("user", "Hi"), Message("input", "x"), Message("assistant", "Hello"))
    assert samples == [Sample(messages)]


def test_no_layout_fits_names_shard_columns_and_fix() -> None:
    with pytest.raises(InputError) as caught:
        find(pa.schema([("question", TEXT), ("answer", TEXT)]))
    said = str(caught.value)
    assert "s3://c/part-12.parquet" in said
    assert "has: question, answer;" in said
    assert "input.columns.instruction=" in said


def test_missing_column_of_a_named_layout() -> None:
    schema = pa.schema([("prompt", TEXT), ("completion", TEXT)])
    with pytest.raises(InputError) as caught:
        find(schema, "alpaca", instruction="prompt")
    assert "shard s3://c/part-12.parquet: column 'output' is missing" in str(caught.value)
    assert "(has: prompt, completion)" in str(caught.value)
    assert "input.columns.response=" in str(caught.value)


@pytest.mark.parametrize("layout", ["auto", "alpaca"])
def test_a_mapped_column_that_is_not_there_is_named(layout: Any) -> None:
    schema = pa.schema({"instruction": pa.string(), "answer": pa.string()})
    with pytest.raises(
        InputError, match=r"'answr' is missing .*columns\.response names.* Did you mean 'answer'"
    ):
        find(schema, layout, response="answr")


@pytest.mark.parametrize("layout", ["auto", "alpaca"])
def test_mapped_column_that_is_missing_is_never_replaced(layout: str) -> None:
    schema = pa.schema([("instruction", TEXT), ("output", TEXT)])
    with pytest.raises(InputError, match=r"part-12\.parquet"):
        find(schema, layout, response="answr")


def test_mapped_input_that_is_missing_is_refused() -> None:
    # The user named it: leaving it out would score every row without its input.
    schema = pa.schema([("instruction", TEXT), ("input", TEXT), ("output", TEXT)])
    with pytest.raises(InputError, match="contxt"):
        find(schema, "alpaca", input="contxt")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("output", pa.int64()),
        ("output", pa.list_(TEXT)),
        ("output", pa.dictionary(pa.int8(), pa.int64())),
        ("instruction", pa.binary()),
        ("input", pa.float64()),
    ],
)
def test_wrong_type_names_shard_column_and_type(name: str, kind: pa.DataType) -> None:
    kinds = {"instruction": TEXT, "input": TEXT, "output": TEXT, name: kind}
    with pytest.raises(InputError) as caught:
        find(pa.schema(list(kinds.items())))
    assert "s3://c/part-12.parquet" in str(caught.value)
    assert f"column '{name}' has type {kind}, expected a string" in str(caught.value)


@pytest.mark.parametrize("kind", [TEXT, pa.list_(TEXT), SHAREGPT])
def test_wrong_type_of_messages(kind: pa.DataType) -> None:
    with pytest.raises(InputError, match="expected a list of structs with role and content"):
        find(pa.schema([("messages", kind)]))


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), TEXT)]
)
def test_every_kind_of_string_reads_the_same(kind: pa.DataType) -> None:
    texts = ["a", None, "c"]
    table = pa.table({"prompt": pa.array(texts, TEXT).cast(kind), "completion": ["1", "2", "3"]})
    assert read(table) == read(table.set_column(0, "prompt", pa.array(texts, TEXT)))


def test_null_column_is_text_that_is_missing() -> None:
    table = pa.table({"prompt": ["a"], "completion": pa.nulls(1)})
    assert read(table) == [Sample((Message("user", "a"), Message("assistant", "")))]


# Nulls, parts, tools


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"instruction": pa.array([None], TEXT), "output": ["3"]}, "null_instruction"),
        ({"prompt": pa.array([None], TEXT), "completion": ["3"]}, "null_prompt"),
        ({"messages": pa.array([None], MESSAGES)}, "null_messages"),
        ({"messages": pa.array([[]], MESSAGES)}, "no_messages"),
        ({"messages": pa.array([[None]], MESSAGES)}, "null_message"),
        ({"messages": pa.array([[says("user", None)]], MESSAGES)}, "content"),
        ({"messages": pa.array([[says("system", None)]], MESSAGES)}, "content"),
        ({"messages": pa.array([[says("tool", None)]], MESSAGES)}, "content"),
        ({"conversations": pa.array([None], SHAREGPT)}, "null_messages"),
    ],
)
def test_null_is_malformed_with_a_reason(table: dict[str, Any], reason: str) -> None:
    assert read(pa.table(table)) == [Sample(malformed=reason)]


def test_text_nan_and_null_are_not_each_other() -> None:
    # A missing input must never become the text 'nan' or 'None' (pitfall 12).
    table = pa.table({"instruction": ["a", "a"], "input": [None, "nan"], "output": ["1", "1"]})
    assert [[m.content for m in s.messages] for s in read(table)] == [
        ["a", "1"],
        ["a", "nan", "1"],
    ]


def test_null_assistant_content_is_an_empty_response() -> None:
    sample = chat(says("user", "Hi"), says("assistant", None), kind=MESSAGES)
    assert sample.messages == (Message("user", "Hi"), Message("assistant", ""))


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "He"}, None, {"type": "text", "text": "llo"}]
    assert chat(says("user", parts)).messages == (Message("user", "Hello"),)


def test_no_content_parts_are_no_text() -> None:
    kind = pa.list_(pa.struct([("role", TEXT), ("content", pa.list_(pa.struct([("text", TEXT)])))]))
    assert chat(says("user", []), kind=kind).messages == (Message("user", ""),)


@pytest.mark.parametrize(
    "content", [[{"type": "image", "text": None}], [{"type": "image"}], ["Hello"], 7, {"text": "x"}]
)
def test_content_that_is_no_text_is_malformed(content: Any) -> None:
    assert chat(says("user", content)) == Sample(malformed="content")


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_tool_call_as_a_role_is_malformed(role: str) -> None:
    assert chat(says("user", "a"), says(role, "{}")) == Sample(malformed="tool_call")


def test_tool_calls_travel_without_the_nulls_of_parquet() -> None:
    calls = [
        {"name": "add", "arguments": {"a": 1, "b": None}, "id": None},
        {"name": "cat", "arguments": {"a": None, "b": "x"}, "id": "7"},
    ]
    sample = chat(says("assistant", None, tool_calls=calls), says("user", "x", tool_calls=None))
    assert sample.messages[0].content == ""
    assert sample.messages[0].extra == {
        "tool_calls": [
            {"name": "add", "arguments": {"a": 1}},
            {"name": "cat", "arguments": {"b": "x"}, "id": "7"},
        ]
    }
    assert sample.messages[1].extra == {}


def test_other_keys_of_a_message_are_left_out() -> None:
    sample = chat(says("tool", "3", name="add", tool_call_id="7", weight=0.5, loss=True))
    assert sample.messages[0].extra == {"name": "add", "tool_call_id": "7"}


def test_a_call_in_the_old_way_is_malformed() -> None:
    call = {"name": "weather", "arguments": "{}"}
    sample = chat(
        says("user", "Rain?", function_call=None),
        says("assistant", None, function_call=call),
        says("function", "no", function_call=None),
        says("assistant", "It is dry.", function_call=None),
    )
    assert sample == Sample(malformed="tool_call")
    none = {"name": None, "arguments": None}  # as Parquet fills what the others lack
    plain = chat(
        says("user", "Rain?", function_call=none), says("assistant", "No.", function_call=none)
    )
    assert plain.malformed is None


def test_arguments_that_are_a_map_are_an_object() -> None:
    arguments = pa.map_(TEXT, TEXT)
    call = pa.struct([("function", pa.struct([("name", TEXT), ("arguments", arguments)]))])
    kind = pa.list_(pa.struct([("role", TEXT), ("content", TEXT), ("tool_calls", pa.list_(call))]))
    function = {"name": "weather", "arguments": [("city", "Paris")]}
    asked = says("assistant", "", tool_calls=[{"function": function}])
    (called,) = chat(asked, kind=kind).messages
    assert called.extra["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


# Bytes that are no text


def invalid(texts: list[bytes | None], kind: pa.DataType = TEXT) -> pa.Array:
    """A string array over bytes that nobody checked, as Parquet readers make them."""
    raw = pa.array(texts, pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, len(raw), raw.buffers())


@pytest.mark.parametrize("kind", [TEXT, pa.large_string()])
def test_invalid_utf8_is_malformed_in_its_row_only(kind: pa.DataType) -> None:
    prompts = invalid([b"a", b"\xff\xfe", None, b"\xed\xa0\x80", b"\xc3\xa9"], kind)
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": prompts, "completion": ["1", "2", "3", "4", "5"]}), sink)
    table = pq.read_table(sink)
    assert [s.malformed for s in read(table)] == [None, "utf8", "null_prompt", "utf8", None]
    assert read(table)[4].messages == (Message("user", "é"), Message("assistant", "5"))


def test_invalid_utf8_inside_messages_is_malformed_in_its_row_only() -> None:
    contents = invalid([b"good", b"bad \xff", b"fine"])
    structs = pa.StructArray.from_arrays([pa.array(["user"] * 3), contents], ["role", "content"])
    messages = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), structs)
    samples = read(pa.table({"messages": messages}))
    assert [s.malformed for s in samples] == [None, "utf8", None]


def test_bad_line_is_malformed_with_its_reason() -> None:
    table = pa.table(
        {
            "prompt": ["a", None],
            "completion": ["1", None],
            BAD_LINE: [None, "line 2: Expecting value"],
        }
    )
    assert [s.malformed for s in read(table)] == [None, "bad_line: line 2: Expecting value"]


# Identity


def test_sample_id_is_what_it_says() -> None:
    # BLAKE2b-128 over: number of parts, then each part behind its length, little-endian.
    import hashlib

    raw = (2).to_bytes(8, "little")
    for part in (b"user", "é".encode()):
        raw += len(part).to_bytes(8, "little") + part
    assert sample_id((Message("user", "é"),)) == hashlib.blake2b(raw, digest_size=16).digest()


@given(CONVERSATIONS, CONVERSATIONS)
def test_ids_are_equal_only_for_equal_messages(one, other) -> None:
    assert (sample_id(one) == sample_id(other)) == (one == other)
    assert len(sample_id(one)) == 16


@given(TEXTS, TEXTS, st.integers(0, 12))
def test_text_moved_between_fields_is_another_sample(one: str, other: str, cut: int) -> None:
    text = one + other
    moved = (text[:cut], text[cut:])
    row = (Message("user", one), Message("assistant", other))
    same = (Message("user", moved[0]), Message("assistant", moved[1]))
    assert (sample_id(row) == sample_id(same)) == ((one, other) == moved)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(0, 3))
def test_messages_that_are_joined_are_another_sample(texts: list[str], at: int) -> None:
    row = tuple(Message("user", text) for text in texts)
    joined = (Message("user", "".join(texts)),)
    assert (sample_id(row) == sample_id(joined)) == (len(texts) == 1)
    # A content that spells the next message's role and content does not swallow it.
    spelled = (*row[:at], Message("user", "useruser"), *row[at:])
    assert sample_id(spelled) != sample_id((*row[:at], Message("user", "user"), *row[at:]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("é", "e\u0301"),  # NFC and NFD
        ("ﬁ", "fi"),
        ("a ", "a"),
        ("A", "a"),
        ("a\r\nb", "a\nb"),
        ("\ufeffa", "a"),
        ("a\x00", "a"),
    ],
)
def test_nothing_is_normalised(one: str, other: str) -> None:
    assert sample_id((Message("user", one),)) != sample_id((Message("user", other),))


def test_role_is_part_of_the_identity() -> None:
    ids = {sample_id((Message(role, "x"),)) for role in ("system", "user", "input", "assistant")}
    assert len(ids) == 4


def test_instruction_and_input_are_kept_apart() -> None:
    table = pa.table({"instruction": ["ab", "a"], "input": ["c", "bc"], "output": ["x", "x"]})
    one, other = (sample_id(s.messages) for s in read(table))
    assert one != other


def test_tool_calls_are_part_of_the_identity() -> None:
    plain = Message("assistant", "")
    calls = [Message("assistant", "", {"tool_calls": [{"name": n}]}) for n in ("add", "cat")]
    assert len({sample_id((m,)) for m in (plain, *calls)}) == 3


def test_order_of_a_tool_calls_keys_is_not_part_of_the_identity() -> None:
    # Equal content has an equal id anywhere, and a struct's fields come in the file's order.
    one = {"name": "add", "arguments": {"a": 1, "b": 2}}
    other = {"arguments": {"b": 2, "a": 1}, "name": "add"}
    ids = {sample_id((Message("assistant", "", {"tool_calls": [c]}),)) for c in (one, other)}
    assert len(ids) == 1


@given(TEXTS, TEXTS)
def test_equal_content_has_an_equal_id_in_every_layout(user: str, answer: str) -> None:
    turns = [says("user", user), says("assistant", answer)]
    shared = [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]
    parts = [says(t["role"], [{"type": "text", "text": t["content"]}]) for t in turns]
    tables = [
        pa.table({"instruction": [user], "input": [""], "output": [answer]}),
        pa.table({"instruction": [user], "output": [answer]}),
        pa.table({"prompt": [user], "completion": [answer]}),
        pa.table({"messages": pa.array([turns], MESSAGES)}),
        pa.table({"messages": pa.array([parts])}),
        pa.table({"conversations": pa.array([shared], SHAREGPT)}),
    ]
    assert len({sample_id(read(table)[0].messages) for table in tables}) == 1


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=6), st.integers(1, 3))
def test_ids_do_not_depend_on_the_rows_around(rows: list[tuple[str, str, str]], size: int) -> None:
    schema = pa.schema([("instruction", TEXT), ("input", TEXT), ("output", TEXT)])
    table = pa.table([list(c) for c in zip(*rows, strict=True)], schema=schema)
    whole = [sample_id(s.messages) for s in read_samples(table, ALPACA)]
    pieces = [table.slice(at, size) for at in range(0, len(table), size)]
    assert whole == [sample_id(s.messages) for p in pieces for s in read_samples(p, ALPACA)]
