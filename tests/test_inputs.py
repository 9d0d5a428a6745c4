"""The front door: what is found, what is refused, and how JSON becomes Parquet."""

import errno
import gzip
import itertools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3, write_parquet
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import footers, ingest, inputs, listing, storage
from pipeline.budgets import SelectSettings
from pipeline.columns import output_schema
from pipeline.config import InputConfig
from pipeline.config_select import SelectConfig
from pipeline.errors import ChangedError, InputError, StorageError
from pipeline.inputs import Corpus
from pipeline.samples import read_samples
from pipeline.schemas import BAD_LINE
from pipeline.units import make_plan

Row = dict[str, Any]

A = {"instruction": "a", "output": "1"}
B = {"instruction": "b", "output": "2"}
C = {"instruction": "c", "output": "3"}


@pytest.fixture
def open_at(tmp_path: Path) -> Callable[..., Corpus]:
    """Open a corpus whose output lies elsewhere."""

    def build(path: Any, **options: Any) -> Corpus:
        paths = [str(p) for p in path] if isinstance(path, list) else str(path)
        return inputs.open_corpus(InputConfig(path=paths, **options), str(tmp_path / "out"))

    return build


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def jsonl(*rows: Any) -> bytes:
    """Rows as JSON lines; bytes stay as they are."""
    return b"".join(lines(row) + b"\n" for row in rows)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)  # type: ignore[no-any-return]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rows_of(corpus: Corpus) -> list[Row]:
    """All rows of a corpus, without the column that names bad lines."""
    tables = [pq.read_table(shard.read_url) for shard in corpus.shards]
    return [
        {k: v for k, v in row.items() if k != BAD_LINE}
        for table in tables
        for row in table.to_pylist()
    ]


def reasons_of(corpus: Corpus) -> list[str | None]:
    """Why each row of an ingested corpus is malformed, as scoring will see it."""
    return [
        sample.malformed
        for shard in corpus.shards
        for sample in read_samples(pq.read_table(shard.read_url), shard.columns)
    ]


def names_of(corpus: Corpus) -> list[str]:
    return [shard.url.rpartition("/")[2] for shard in corpus.shards]


FORMATS = {
    "a.jsonl": jsonl(A, B),
    "a.ndjson": jsonl(A, B),
    "a.JSONL": jsonl(A, B),
    "a.json": b"[\n" + lines(A) + b",\n" + lines(B) + b"]\n",
    "one-line.json": lines([A, B]),
    "lines.json": jsonl(A, B),
    "a.jsonl.gz": gzip.compress(jsonl(A, B)),
    "members.jsonl.gz": gzip.compress(jsonl(A)) + gzip.compress(jsonl(B)),
    "split-line.jsonl.gz": gzip.compress(jsonl(A, B)[:10]) + gzip.compress(jsonl(A, B)[10:]),
    "array.json.gz": gzip.compress(lines([A, B])),
    "a.jsonl.zst": zstd(jsonl(A, B)),
    "frames.jsonl.zst": zstd(jsonl(A)) + zstd(jsonl(B)),
    "no-last-newline.jsonl": jsonl(A) + lines(B),
    "blank-lines.jsonl": b"\n" + jsonl(A) + b"  \n\n" + jsonl(B),
    "windows.jsonl": jsonl(A, B).replace(b"\n", b"\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(A, B),
    "bom-and-blank-line.jsonl": b"\xef\xbb\xbf\r\n" + jsonl(A, B),
    "bom.json": b"\xef\xbb\xbf[\n" + lines(A) + b",\n" + lines(B) + b"]",
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_json_format_becomes_the_same_rows(
    tmp_path: Path, open_at: Callable[..., Corpus], name: str
) -> None:
    corpus = open_at(write(tmp_path / "in" / name, FORMATS[name]))
    assert rows_of(corpus) == [A, B]
    assert reasons_of(corpus) == [None, None]


def test_parquet_is_read_where_it_is(tmp_path: Path, open_at: Callable[..., Corpus]) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", [A, B, C], row_group_size=2)
    (shard,) = open_at(path).shards
    assert shard.url == shard.read_url == str(path)
    assert shard.row_groups == (2, 1)
    assert shard.size == path.stat().st_size
    assert not (tmp_path / "out").exists()


def test_directories_globs_files_and_lists_name_the_same_shards(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", [A])
    write_parquet(folder / "deep/b.pq", [B])
    write(folder / "c.jsonl", jsonl(C))
    write(folder / "README.md", b"not data")
    all_names = ["a.parquet", "c.jsonl#0", "b.pq"]  # sorted by whole URL
    assert names_of(open_at(folder)) == all_names
    assert names_of(open_at(f"{folder}/")) == all_names
    assert names_of(open_at(folder / "*.parquet")) == ["a.parquet"]
    assert names_of(open_at(folder / "**")) == all_names
    assert names_of(open_at(folder / "[ac].*")) == ["a.parquet", "c.jsonl#0"]
    listed = [folder / "c.jsonl", folder / "a.parquet", folder / "a.parquet", folder / "*.parquet"]
    assert names_of(open_at(listed)) == ["a.parquet", "c.jsonl#0"]


def test_relative_paths_and_detours_are_the_same_shard(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", [A])
    monkeypatch.chdir(tmp_path)
    for spelling in ("in", "./in/a.parquet", "in/../in", f"file://{path}"):
        assert [s.url for s in open_at(spelling).shards] == [str(path)]


def test_hidden_files_and_folders_are_ignored(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    folder = tmp_path / "_weekly/in"  # above the input, such a name means nothing
    write_parquet(folder / "a.parquet", [A])
    for hidden in ("_b.parquet", ".c.parquet", "_temporary/0/d.parquet", ".cache/e.parquet"):
        write_parquet(folder / hidden, [B])
    write(folder / "_SUCCESS", b"")
    assert names_of(open_at(folder)) == ["a.parquet"]
    assert names_of(open_at(folder / "**")) == ["a.parquet"]


@pytest.mark.parametrize(
    "pattern", ["", "/**", "/**/*.parquet", "/*/*.parquet", "/[xy]/a.parquet", "/[xy]/**"]
)
def test_a_directory_that_cannot_be_listed_is_not_left_out(
    tmp_path: Path,
    open_at: Callable[..., Corpus],
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
) -> None:
    """Else the best tenth would be one of what a sick disk happens to give."""
    for name in ("x", "y"):
        write_parquet(tmp_path / "in" / name / "a.parquet", [A])
    assert len(open_at(f"{tmp_path}/in{pattern}").shards) == 2
    make_sick(monkeypatch, "in/y")
    with pytest.raises((InputError, StorageError), match="Input/output error"):
        open_at(f"{tmp_path}/in{pattern}")


def test_directories_that_a_glob_matches_are_read(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    """As Spark writes them, one for what is called a file."""
    write_parquet(tmp_path / "in/de.parquet", [A])
    write_parquet(tmp_path / "in/en.parquet/part-0.parquet", [B])
    write_parquet(tmp_path / "in/en.parquet/_temporary/part-1.parquet", [B])
    for pattern in ("*.parquet", "**/*.parquet", "**/??.parquet"):
        assert names_of(open_at(tmp_path / "in" / pattern)) == ["de.parquet", "part-0.parquet"]
    with pytest.raises(InputError, match=r"a\*\*b"):
        open_at(tmp_path / "a**b")


def test_a_path_that_is_there_is_no_glob(tmp_path: Path, open_at: Callable[..., Corpus]) -> None:
    write_parquet(tmp_path / "in/a[1].parquet", [A, B])
    write_parquet(tmp_path / "in/a1.parquet", [C])
    write_parquet(tmp_path / "data [v2]/b.parquet", [C])
    assert rows_of(open_at(tmp_path / "in/a[1].parquet")) == [A, B]
    assert names_of(open_at(tmp_path / "data [v2]")) == ["b.parquet"]


def test_a_link_that_leads_nowhere_matters_where_it_would_be_read(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    write_parquet(tmp_path / "in/a.parquet", [A])
    (tmp_path / "in/.#notes.txt").symlink_to("user@host.1234")  # an editor's lock
    for path in ("in", "in/*", "in/**", "in/*.parquet"):
        assert names_of(open_at(tmp_path / path)) == ["a.parquet"]
    (tmp_path / "in/b.parquet").symlink_to("gone.parquet")
    with pytest.raises(InputError, match=r"b\.parquet"):
        open_at(tmp_path / "in")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("path", "output"),
    [
        ("en_*", "en_out"),  # which will match what comes to lie there
        ("en_*", "en_out/deep"),
        ("en_[1o]*", "en_out"),
        ("en_*/*", "en_out"),  # where LATEST.json comes to lie
        ("en_*/*.parquet", "en_out"),
        ("*.parquet", "x.parquet/deep/out"),  # a directory that matches is read as a whole
        ("data [v2]", "data [v2]/out"),  # no glob
        ("?n_1/**", "en_1/out"),
        ("en_*/**", "en_out"),
        ("en_**", "en_out/deep"),
    ],
)
def test_an_output_that_the_input_will_hold_is_refused(
    tmp_path: Path, path: str, output: str, there: bool
) -> None:
    write_parquet(tmp_path / "en_1/a.parquet", [A])
    write_parquet(tmp_path / "data [v2]/a.parquet", [A])
    if there:
        write_parquet(tmp_path / output / "cherry/b.parquet", [A])
    with pytest.raises(InputError, match=rf"it lies inside the input .*{re.escape(path)}, so"):
        inputs.open_corpus(InputConfig(path=f"{tmp_path}/{path}"), str(tmp_path / output))


def test_a_hidden_directory_above_brackets_means_nothing(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    write_parquet(tmp_path / "_data [v2]/a.parquet", [A])
    assert names_of(open_at(tmp_path / "_data [v2]")) == ["a.parquet"]


@pytest.mark.parametrize("pattern", ["", "/**/*.parquet", "/*/*.parquet", "/x/**"])
def test_what_is_never_read_need_not_be_readable(
    tmp_path: Path,
    open_at: Callable[..., Corpus],
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
) -> None:
    write_parquet(tmp_path / "in/x/a.parquet", [A])
    for name in ("_temporary", "lost+found"):
        (tmp_path / "in" / name).mkdir()
    make_sick(monkeypatch, "_temporary", "lost+found")
    assert names_of(open_at(f"{tmp_path}/in{pattern}")) == ["a.parquet"]


@pytest.mark.parametrize("path", ["_raw", "_raw/*.parquet", "_raw/**"])
def test_a_hidden_directory_that_is_named_must_be_readable(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    write_parquet(tmp_path / "_raw/a.parquet", [A])
    make_sick(monkeypatch, "_raw", functions=("scandir", "listdir"))  # as without permission
    with pytest.raises((InputError, StorageError), match="Input/output error"):
        open_at(tmp_path / path)


def make_sick(
    monkeypatch: pytest.MonkeyPatch,
    *names: str,
    functions: tuple[str, ...] = ("scandir", "listdir", "lstat"),
) -> None:
    """Have whatever asks for directories of these names fail as a sick disk does."""
    for function in functions:
        right = getattr(os, function)

        def sick(path: Any = ".", *rest: Any, right: Any = right, **options: Any) -> Any:
            if any(f"{name}/" in f"{path}/" for name in names):
                raise OSError(errno.EIO, "Input/output error", str(path))
            return right(path, *rest, **options)

        monkeypatch.setattr(os, function, sick)


def test_of_links_to_one_directory_the_first_by_name_is_taken(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its URL is part of what units are called, on every copy of the disk."""
    write_parquet(tmp_path / "far/a.parquet", [A])
    for name in "wxyz":
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "link").symlink_to(tmp_path / "far")
    walk = os.walk

    def backwards(*arguments: Any, **options: Any) -> Any:
        for root, folders, names in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield root, folders, names

    for patched in (False, True):
        if patched:
            monkeypatch.setattr(os, "walk", backwards)
        (shard,) = open_at(tmp_path / "in").shards
        assert shard.url.endswith("in/w/link/a.parquet")


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_of_links_to_one_file_the_first_by_name_is_taken(
    tmp_path: Path, open_at: Callable[..., Corpus], order: tuple[str, str]
) -> None:
    write_parquet(tmp_path / "far/x.parquet", [A])
    for name in order:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.parquet").symlink_to(tmp_path / "far/x.parquet")
    (shard,) = open_at([str(tmp_path / name) for name in order]).shards
    assert shard.url == str(tmp_path / "a/x.parquet")


class _TwoNames(MemoryFileSystem):  # type: ignore[misc]
    """A store that lists under one name what may be asked for by another, as Azure's does."""

    protocol = ("cherryone", "cherrytwo")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(re.sub(r"^cherry(one|two)://", "/", path)))


class _OfHosts(_TwoNames):
    protocol = "cherryhost"

    def __init__(self, host: str = "", **options: Any) -> None:
        super().__init__(**options)

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, str]:
        return {"host": url.split("/")[2]}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(re.sub(r"^cherryhost://[^/]*", "", path)))


def test_a_store_of_two_names_has_one(tmp_path: Path, open_at: Callable[..., Corpus]) -> None:
    for name in _TwoNames.protocol:
        fsspec.register_implementation(name, _TwoNames, clobber=True)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([A]), sink)
    storage.publish("cherryone://c/_raw/a.parquet", sink.getvalue().to_pybytes())
    one, two = (open_at(f"{name}://c/_raw") for name in _TwoNames.protocol)
    assert one == two  # and nothing of it is hidden
    assert storage.absolute("cherrytwo://c/_raw/") == storage.absolute("cherryone://c/_raw")
    fsspec.register_implementation("cherryhost", _OfHosts, clobber=True)
    for elsewhere in ("simplecache::cherrytwo://c/_raw", "cherryhost://head/c/_raw"):
        assert storage.absolute(elsewhere) == elsewhere  # its path alone does not say where it is


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_piece_of_chats_may_have_none(
    tmp_path: Path,
    open_at: Callable[..., Corpus],
    monkeypatch: pytest.MonkeyPatch,
    column: str,
) -> None:
    monkeypatch.setattr(ingest, "_INGEST_ROWS", 2)
    keys = ("role", "content") if column == "messages" else ("from", "value")
    chat = {column: [dict(zip(keys, ("user", "a"), strict=True))]}
    text = jsonl(chat, chat) + b"{bad\n" + jsonl({"other": 1})
    corpus = open_at(write(tmp_path / "in/a.jsonl", text))
    assert [shard.num_rows for shard in corpus.shards] == [2, 2]
    assert str(reasons_of(corpus)[2]).startswith("bad_line: line 3")


def test_two_spellings_of_a_bucket_overlap() -> None:
    with pytest.raises(InputError, match="it lies inside the input"):
        inputs.open_corpus(InputConfig(path="s3a://bucket/in"), "s3://bucket/in/out")


def test_what_a_piece_lacks_or_has_as_numbers_is_read_as_in_the_others(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file is cut is an accident: a row must not be refused for it."""
    monkeypatch.setattr(ingest, "_INGEST_ROWS", 2)
    rows = [A, B, {"instruction": "Name one."}, {"instruction": "And?"}, {**A, "output": 7}]
    found = rows_of(open_at(write(tmp_path / "in/a.jsonl", jsonl(*rows))))
    assert [row["output"] for row in found] == [A["output"], B["output"], None, None, "7"]


def test_a_hidden_file_that_is_named_is_read(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    path = write_parquet(tmp_path / "in/_a.parquet", [A])
    assert names_of(open_at(path)) == ["_a.parquet"]


def test_a_bad_line_is_a_malformed_row_that_names_its_line(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    text = jsonl(A, b'{"instruction": "cut', b"", b"[1]", b'{"output":"\xff"}', b"null", B)
    corpus = open_at(write(tmp_path / "in/a.jsonl", text))
    nothing = {"instruction": None, "output": None}
    assert rows_of(corpus) == [A, nothing, nothing, nothing, nothing, B]
    first, cut, array, utf8, null, last = reasons_of(corpus)
    assert (first, last) == (None, None)
    assert str(cut).startswith("bad_line: line 2: Invalid control character")
    assert array == "bad_line: line 4: got list, expected an object"
    assert str(utf8).startswith("bad_line: line 5: 'utf-8' codec")
    assert null == "bad_line: line 6: got NoneType, expected an object"


def test_an_array_element_that_is_no_object_names_its_place(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    corpus = open_at(write(tmp_path / "in/a.json", lines([A, "text", B])))
    expected = [None, "bad_line: element 2: got str, expected an object", None]
    assert reasons_of(corpus) == expected


def test_scalars_of_mixed_types_become_text(tmp_path: Path, open_at: Callable[..., Corpus]) -> None:
    values = ["7", 7, 7.5, True, None, 2**70]
    text = jsonl(*({**A, "x": value} for value in values))
    corpus = open_at(write(tmp_path / "in/a.jsonl", text))
    assert [r["x"] for r in rows_of(corpus)] == ["7", "7", "7.5", "true", None, str(2**70)]
    assert reasons_of(corpus) == [None] * 6


def test_nan_is_a_value_that_is_not_there(tmp_path: Path, open_at: Callable[..., Corpus]) -> None:
    """Python writes it for what pandas has no value for; 'NaN' must not come into a prompt."""
    text = jsonl({**A, "input": math.nan}, {**A, "input": "1 2"}, {**A, "output": math.nan})
    text += jsonl({**A, "meta": {"tags": ["x", math.nan]}})
    *rows, nested = rows_of(open_at(write(tmp_path / "in/a.jsonl", text)))
    assert nested["meta"] == {"tags": ["x", None]}
    assert [r["input"] for r in rows] == [None, "1 2", None]
    assert rows[2]["output"] is None


def test_integers_stay_integers(tmp_path: Path, open_at: Callable[..., Corpus]) -> None:
    corpus = open_at(write(tmp_path / "in/a.jsonl", jsonl({**A, "x": 1}, {**B, "x": 2})))
    assert corpus.shards[0].schema.field("x").type == pa.int64()


def test_a_value_that_does_not_fit_the_lists_before_it_is_named_by_its_line(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_INGEST_ROWS", 2)
    turns = [{"role": "user", "content": "a"}]
    text = jsonl(*[{"messages": turns}] * 3, b"", {"messages": 5})
    corpus = open_at(write(tmp_path / "in/a.jsonl", text))
    assert [r["messages"] for r in rows_of(corpus)] == [turns, turns, turns, None]
    *fine, bad = reasons_of(corpus)
    assert fine == [None] * 3
    assert str(bad).startswith("bad_line: line 5: column 'messages': ")


def test_an_integer_that_no_double_holds_does_not_stop_a_file(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    text = jsonl({**A, "x": {"n": 2**53 + 1}}, {**B, "x": {"n": 0.5}})
    corpus = open_at(write(tmp_path / "in/a.jsonl", text))
    assert [r["x"] for r in rows_of(corpus)] == [None, {"n": 0.5}]
    bad, fine = reasons_of(corpus)
    assert str(bad).startswith("bad_line: line 1: column 'x': ")
    assert fine is None


def test_objects_that_are_all_empty_are_malformed_rows(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    corpus = open_at(write(tmp_path / "in/a.jsonl", jsonl({}, {})))
    assert reasons_of(corpus) == ["empty_object"] * 2


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_an_upload_that_failed_is_no_empty_file(
    tmp_path: Path, open_at: Callable[..., Corpus], suffix: str
) -> None:
    write(tmp_path / "in/a.jsonl", jsonl(A))
    write(tmp_path / f"in/b.jsonl.{suffix}", b"")
    with pytest.raises(InputError, match="it has 0 bytes, which no compressed file has"):
        open_at(tmp_path / "in")


@pytest.mark.parametrize(
    ("files", "links", "expected"),
    [
        # git-annex: what is seen is a link to what is hidden.
        ({".git/annex/MD5.parquet"}, {"a.parquet": ".git/annex/MD5.parquet"}, ["a.parquet"]),
        # A mount of Kubernetes.
        (
            {"..2026/a.parquet"},
            {"..data": "..2026", "a.parquet": "..data/a.parquet"},
            ["a.parquet"],
        ),
        # The cache of the Hub: blobs have no suffix.
        ({"blobs/77"}, {"snapshots/1/a.parquet": "blobs/77"}, ["snapshots/1/a.parquet"]),
        ({"a.parquet"}, {"latest.parquet": "a.parquet", "b.parquet": "a.parquet"}, ["a.parquet"]),
        ({"v1/a.parquet"}, {"latest": "v1"}, ["v1/a.parquet"]),
    ],
    ids=["annex", "mount", "hub", "alias", "alias of a directory"],
)
@pytest.mark.parametrize("pattern", ["", "*.parquet", "*/*.parquet"])
def test_a_file_is_read_once_by_whatever_links(
    tmp_path: Path,
    open_at: Callable[..., Corpus],
    files: set[str],
    links: dict[str, str],
    expected: list[str],
    pattern: str,
) -> None:
    folder = tmp_path / "in"
    for name in files:
        write_parquet(folder / name, [A])
    for link, target in links.items():
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).symlink_to(folder / target)
    if pattern:
        if expected[0].count("/") != pattern.count("/"):
            return
        paths = [str(folder / pattern), str(folder)]
    else:
        paths = [str(folder)]
    corpus = open_at(paths)
    assert [str(Path(shard.url).relative_to(folder)) for shard in corpus.shards] == expected


def test_a_link_into_the_output_is_refused(tmp_path: Path, open_at: Callable[..., Corpus]) -> None:
    write_parquet(tmp_path / "in/a.parquet", [A])
    write_parquet(tmp_path / "out/cherry/part-0.parquet", [A])
    (tmp_path / "in/more").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"more/out/cherry/part-0\.parquet: it is, by a link,"):
        open_at(tmp_path / "in")


def test_files_that_are_not_read_are_named(
    tmp_path: Path, open_at: Callable[..., Corpus], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "in/a.jsonl", jsonl(A))
    for name in ("b.parquet.gz", "_SUCCESS", ".hidden", "README.md"):
        write(tmp_path / "in" / name, b"x")
    with caplog.at_level("INFO", logger="cherry"):
        open_at(tmp_path / "in")
    assert "not read: 2 other files (README.md, b.parquet.gz)" in caplog.text


def test_a_store_that_names_no_version_is_refused(
    open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, a shard that was overwritten would keep its old scores for ever."""
    entry = listing.ObjectInfo("http://store/a.parquet", 5, "")
    monkeypatch.setattr(listing, "list_objects", lambda _: [entry])
    with pytest.raises(InputError, match=r"a\.parquet: its store tells neither an ETag nor when"):
        open_at("http://store/a.parquet")


def test_lone_surrogates_become_replacement_characters(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    row = {"instruction": "a\ud800b", "output": "\ud83d\ude00", "\udfff": [{"\ud800": "\udc00"}]}
    text = jsonl(row)  # json.dumps spells every surrogate as an escape
    assert b'"a\\ud800b"' in text
    corpus = open_at(write(tmp_path / "in/a.jsonl", text))
    expected = {"instruction": "a\ufffdb", "output": "\U0001f600", "\ufffd": [{"\ufffd": "\ufffd"}]}
    assert rows_of(corpus) == [expected]


def test_objects_without_keys_do_not_stop_a_file(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    text = jsonl({**A, "meta": {}}, {**B, "meta": {}, "list": [{}], "deep": {"a": {}}})
    corpus = open_at(write(tmp_path / "in/a.jsonl", text))
    assert [(r["instruction"], r["meta"]) for r in rows_of(corpus)] == [("a", None), ("b", None)]
    assert reasons_of(corpus) == [None, None]


@pytest.mark.parametrize("depth", [100, 600, 100_000])
def test_a_row_nested_too_deep_does_not_harm_its_neighbours(
    tmp_path: Path, open_at: Callable[..., Corpus], depth: int
) -> None:
    deep = lines(B)[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
    corpus = open_at(write(tmp_path / "in/a.jsonl", jsonl(A, deep, C)))
    first, bad, last = reasons_of(corpus)
    assert (first, last) == (None, None)
    assert str(bad).startswith("bad_line: line 2: ")


def test_rows_nested_as_deep_as_allowed_come_back(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    value: Any = "x"
    for level in range(ingest._MAX_DEPTH - 1):
        value = [value] if level % 2 else {"k": value}
    corpus = open_at(write(tmp_path / "in/a.jsonl", jsonl({**A, "x": value})))
    assert rows_of(corpus) == [{**A, "x": value}]


def test_a_row_cannot_declare_itself_malformed(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    corpus = open_at(write(tmp_path / "in/a.jsonl", jsonl({**A, BAD_LINE: "no"})))
    assert reasons_of(corpus) == [None]


def test_parquet_that_another_run_made_of_json_is_no_input(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    """Its column of bad lines would be believed, and not be in the subset."""
    write_parquet(tmp_path / "ingest/piece.parquet", [{**A, BAD_LINE: None}])
    with pytest.raises(InputError, match=rf"piece\.parquet: its column '{BAD_LINE}' is Cherry's"):
        open_at(tmp_path / "ingest")


def test_bytes_are_those_of_the_column_whatever_dots_are_in_its_name(tmp_path: Path) -> None:
    nested = [{"role": "user", "content": "a" * 2000}]
    rows = [{"my.messages": nested, "my": 1, "messages.content": "b", "messages": nested[:0]}]
    path = str(write_parquet(tmp_path / "a.parquet", rows))
    found = footers.read_footer(path, path).column_bytes
    with pq.ParquetFile(path) as parquet:
        group = parquet.metadata.row_group(0)
        total = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns))
    assert found.keys() == rows[0].keys()
    assert found["my.messages"] > 2000
    assert 0 < found["my"] < 200
    assert sum(found.values()) == total


def test_a_missing_path_an_empty_directory_and_one_without_data_are_told_apart(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    with pytest.raises(InputError, match=r"absent: there is no such file, directory or bucket"):
        open_at(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: nothing is there: an empty directory"):
        open_at(tmp_path / "empty")
    with pytest.raises(InputError, match=r"no-match-\*\.parquet: nothing is there"):
        open_at(tmp_path / "no-match-*.parquet")
    write(tmp_path / "docs/README.md", b"text")
    with pytest.raises(InputError, match=r"no Parquet inside.*1 other file \(README\.md\)"):
        open_at(tmp_path / "docs")


@pytest.mark.parametrize("text", [b"", b"\n\n", b"[]"])
def test_files_without_any_row_are_refused(
    tmp_path: Path, open_at: Callable[..., Corpus], text: bytes
) -> None:
    with pytest.raises(InputError, match=r"no rows in 1 file\."):
        open_at(write(tmp_path / "in/a.jsonl", text))


def test_an_empty_file_among_others_adds_nothing(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    write(tmp_path / "in/a.jsonl", b"")
    write_parquet(tmp_path / "in/b.parquet", [A])
    corpus = open_at(tmp_path / "in")
    assert rows_of(corpus) == [A]
    inputs.remember_footers(corpus, str(tmp_path / "out"))
    again = open_at(tmp_path / "in")
    assert again.shards == corpus.shards
    assert not again.footers  # nothing is new


UNREADABLE = {
    "garbage.parquet": b"PAR1 this is not it" * 50,
    "empty.parquet": b"",
    "bad-footer.parquet": b"PAR1" + b"\x00" * 100 + (50).to_bytes(4, "little") + b"PAR1",
    "prose.jsonl": b"Dear reader,\nthis is a letter.\n",
    "object.json": b'{\n"rows": [\n1\n]\n}\n',
    "cut.json": lines([A, B])[:-5],
    "deep.json": b"[" * 100_000,
    "cut.jsonl.gz": gzip.compress(jsonl(*[A, B, C] * 2000))[:-30],
    "no.jsonl.gz": jsonl(A),
    "no.jsonl.zst": jsonl(A),
    "columns.parquet": None,
    "twice.parquet": None,
}


def write_unreadable(path: Path) -> Path:
    data = UNREADABLE[path.name]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "columns.parquet":
        return write_parquet(path, [{"question": "a", "answer": "b"}])
    if path.name == "twice.parquet":
        twice = pa.Table.from_arrays(
            [pa.array(["a"])] * 3, ["instruction", "instruction", "output"]
        )
        pq.write_table(twice, path)
        return path
    assert data is not None
    return write(path, data)


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_shard_ends_the_run_or_is_skipped(
    tmp_path: Path, open_at: Callable[..., Corpus], name: str
) -> None:
    bad = write_unreadable(tmp_path / "in" / name)
    write_parquet(tmp_path / "in/z.parquet", [A])
    with pytest.raises(InputError) as caught:
        open_at(tmp_path / "in")
    assert str(bad) in str(caught.value)
    corpus = open_at(tmp_path / "in", on_bad_shard="skip")
    assert names_of(corpus) == ["z.parquet"]
    assert [str(bad) in reason for reason in corpus.skipped] == [True]


def test_a_truncated_parquet_is_refused_by_its_footer(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", [A] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file"):
        open_at(path)


def test_skipping_every_shard_leaves_nothing_to_do(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    path = write(tmp_path / "in/a.parquet", b"garbage")
    with pytest.raises(InputError, match=r"no rows in 1 file\.\n.*not a readable Parquet file"):
        open_at(path, on_bad_shard="skip")


@pytest.mark.parametrize("output", ["in", "in/out", "in/deep/out", "in/../in/out"])
@pytest.mark.parametrize("source", ["in", "in/", "in/**", "in/**/*.parquet"])
def test_an_output_inside_the_input_is_refused(tmp_path: Path, source: str, output: str) -> None:
    write_parquet(tmp_path / "in/a.parquet", [A])
    config = InputConfig(path=f"{tmp_path}/{source}")
    with pytest.raises(InputError, match=r"output .*: it lies inside the input .*/in"):
        inputs.open_corpus(config, f"{tmp_path}/{output}")


@pytest.mark.parametrize(
    ("source", "output"),
    [
        *itertools.product(("in", "in/*", "in/*.parquet"), ("an-output", "out", ".")),
        ("in/*.parquet", "in/out"),  # which nothing there will match
        ("in/a*", "in/out"),
        ("i*/**", "out"),
        ("i*/**/*.parquet", "other/out"),
    ],
)
def test_an_output_that_the_input_will_not_hold_is_accepted(
    tmp_path: Path, source: str, output: str
) -> None:
    write_parquet(tmp_path / "in/a.parquet", [A])
    write_parquet(tmp_path / output / "cherry/0/b.parquet", [A])
    corpus = inputs.open_corpus(InputConfig(path=f"{tmp_path}/{source}"), f"{tmp_path}/{output}")
    assert rows_of(corpus) == [A]


def test_ingest_is_done_once(tmp_path: Path, open_at: Callable[..., Corpus]) -> None:
    path = write(tmp_path / "in/a.jsonl", jsonl(A, B))
    first = open_at(path)
    (piece,) = (shard.read_url for shard in first.shards)
    written = os.stat(piece).st_mtime_ns
    unread = gzip.compress(b"")  # if it were read again, it would be refused
    stat = path.stat()
    path.write_bytes(unread.ljust(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_at(path) == first
    assert os.stat(piece).st_mtime_ns == written


def test_a_changed_source_is_ingested_again_beside_the_old(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    path = write(tmp_path / "in/a.jsonl", jsonl(A))
    (before,) = open_at(path).shards
    os.utime(path, ns=(0, 0))
    path.write_bytes(jsonl(A, B))
    (after,) = open_at(path).shards
    assert after.url == before.url
    assert after.version != before.version
    assert after.read_url != before.read_url
    assert pq.read_table(before.read_url).num_rows == 1
    assert pq.read_table(after.read_url).num_rows == 2


def test_an_ingest_that_was_cut_off_is_done_again(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    path = write(tmp_path / "in/a.jsonl", jsonl(A, B))
    (shard,) = open_at(path).shards
    done = Path(shard.read_url).parent / "_DONE.json"
    done.unlink()
    assert rows_of(open_at(path)) == [A, B]
    assert json.loads(done.read_text())["pieces"] == [Path(shard.read_url).name]
    for damaged in ('{"pieces": [', "[]", "{}"):
        done.write_text(damaged)
        assert rows_of(open_at(path)) == [A, B]


def test_a_source_overwritten_while_it_is_ingested_is_refused(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows would count as those of the version that was listed."""
    path = write(tmp_path / "in/a.jsonl", jsonl(A))
    to_parquet = ingest._to_parquet

    def overwrite(*arguments: Any) -> bytes:
        write(path, jsonl(A, B))
        return to_parquet(*arguments)

    monkeypatch.setattr(ingest, "_to_parquet", overwrite)
    with pytest.raises(ChangedError, match=r"a\.jsonl: it was overwritten while it was in use"):
        open_at(path)
    monkeypatch.undo()
    assert rows_of(open_at(path)) == [A, B]


def test_a_shard_overwritten_before_its_footer_is_read_is_refused(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "in/a.parquet", [A])
    read_footer = footers.read_footer

    def overwrite(*urls: str) -> Any:
        write_parquet(path, [A, B])
        return read_footer(*urls)

    monkeypatch.setattr(footers, "read_footer", overwrite)
    with pytest.raises(ChangedError, match=r"a\.parquet: it was overwritten while its footer was"):
        open_at(path)


def test_a_large_file_becomes_several_pieces(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_INGEST_ROWS", 2)
    rows = [{"instruction": str(i), "output": "x"} for i in range(5)]
    path = write(tmp_path / "in/a.jsonl", jsonl(*rows))
    corpus = open_at(path)
    assert names_of(corpus) == ["a.jsonl#0", "a.jsonl#1", "a.jsonl#2"]
    assert [shard.num_rows for shard in corpus.shards] == [2, 2, 1]
    assert rows_of(corpus) == rows


def test_pieces_are_planned_in_the_order_of_lines(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_INGEST_ROWS", 1)
    rows = [{"instruction": str(i), "output": "x"} for i in range(12)]  # '#10' sorts before '#2'
    assert rows_of(open_at(write(tmp_path / "in/a.jsonl", jsonl(*rows)))) == rows


def test_max_rows_takes_the_first_rows_in_the_order_of_shards(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    write_parquet(tmp_path / "in/b.parquet", [C] * 4)
    write_parquet(tmp_path / "in/a.parquet", [A, B, C], row_group_size=2)
    corpus = open_at(tmp_path / "in", max_rows=5)
    ranges = [
        (unit.shard_url.rpartition("/")[2], unit.start, unit.stop)
        for unit in make_plan(corpus, str(tmp_path / "out"), "fp", 2, 1, max_rows=5).units
    ]
    assert ranges == [("a.parquet", 0, 2), ("a.parquet", 2, 3), ("b.parquet", 0, 2)]


@pytest.mark.s3
def test_an_s3_corpus_lists_as_a_local_one(s3_server: S3) -> None:
    fs = s3_server.filesystem()
    for name, data in {
        "a.jsonl.gz": FORMATS["members.jsonl.gz"],
        "deep/b.jsonl": jsonl(C),
        "_temporary/c.jsonl": jsonl(C),
        "_SUCCESS": b"",
    }.items():
        fs.pipe_file(s3_server.url("inputs", name), data)
    output = s3_server.url("inputs-out")
    for path in ("inputs", "inputs/", "inputs/**"):
        corpus = inputs.open_corpus(InputConfig(path=s3_server.url(path)), output)
        assert names_of(corpus) == ["a.jsonl.gz#0", "b.jsonl#0"]
    assert all(shard.read_url.startswith(f"{output}/ingest/") for shard in corpus.shards)
    assert reasons_of_s3(s3_server, corpus) == [None, None, None]


def reasons_of_s3(s3_server: S3, corpus: Corpus) -> list[str | None]:
    fs = s3_server.filesystem()
    tables = [pq.read_table(fs.open(shard.read_url, "rb")) for shard in corpus.shards]
    return [value for table in tables for value in table[BAD_LINE].to_pylist()]


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, width=32) | st.text()
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_objects = st.dictionaries(st.sampled_from(["a", "b", "\ud800", "instruction"]), _values)


@settings(deadline=None, max_examples=150)
@given(st.lists(_objects, min_size=1, max_size=6))
def test_any_json_objects_become_a_readable_shard_with_a_row_for_each(rows: list[Row]) -> None:
    parsed = [
        ingest._parse_line(json.dumps(row).encode(), f"line {i}") for i, row in enumerate(rows)
    ]
    table = pq.read_table(pa.BufferReader(ingest._to_parquet(parsed, {})))
    assert table.num_rows == len(rows)
    for row, stored in zip(rows, table.to_pylist(), strict=True):
        if stored[BAD_LINE] is None and isinstance(row.get("a"), str):
            assert stored["a"] == row["a"]


def test_a_piece_of_broken_lines_only_is_malformed_rows(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_INGEST_ROWS", 2)
    lines = ['{"prompt": "a", "completion": "b"}'] * 2 + ["{broken"] * 2
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    corpus = open_at(tmp_path / "in")
    assert [shard.num_rows for shard in corpus.shards] == [2, 2]
    last = corpus.shards[1]
    samples = list(read_samples(pq.read_table(last.read_url), last.columns))
    reasons = [str(sample.malformed)[:17] for sample in samples]
    assert reasons == ["bad_line: line 3:", "bad_line: line 4:"]


def test_scalars_that_differ_over_pieces_are_text_in_the_output(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "_INGEST_ROWS", 1)
    lines = [json.dumps({"prompt": "a", "completion": "b", "id": i}) for i in (1, "two", 3)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    settings = SelectSettings.from_config(SelectConfig(), "ifd_loss_ratio")
    assert output_schema(open_at(tmp_path / "in"), settings).field("id").type == pa.string()


def test_another_version_of_the_ingest_makes_the_pieces_anew(
    tmp_path: Path, open_at: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in" / "a.jsonl", jsonl(A, B))
    first = open_at(source)
    inputs.remember_footers(first, str(tmp_path / "out"))
    assert not open_at(source).footers  # nothing is new
    monkeypatch.setattr(ingest, "INGEST_VERSION", 99)
    newer = footers._SCHEMA.with_metadata({"cherry.ingest_version": "99"})
    monkeypatch.setattr(footers, "_SCHEMA", newer)
    again = open_at(source)
    assert again.shards[0].read_url != first.shards[0].read_url


def test_pieces_that_somebody_removed_are_made_again(
    tmp_path: Path, open_at: Callable[..., Corpus]
) -> None:
    source = write(tmp_path / "in" / "a.jsonl", jsonl(A, B))
    corpus = open_at(source)
    inputs.remember_footers(corpus, str(tmp_path / "out"))
    Path(corpus.shards[0].read_url).unlink()
    assert rows_of(open_at(source)) == [A, B]
