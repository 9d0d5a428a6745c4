"""Storage that misbehaves: success after a few tries or an error that says so, and no half object.

A fault-injecting proxy stands between the pipeline and SeaweedFS. Pauses between attempts are
taken out, three attempts are made; what is there in the end is asked of SeaweedFS itself.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from botocore.retries.quota import RetryQuota
from botocore.retries.standard import ExponentialBackoff
from conftest import S3
from fault_proxy import Fault, FaultProxy

from pipeline import inputs, listing, s3, storage, storage_faults, tokenising, uploads
from pipeline import rows as rows_module
from pipeline.config import InputConfig
from pipeline.errors import CherryError, InputError, ShardError, StorageError
from pipeline.listing import ObjectInfo

pytestmark = pytest.mark.s3

ATTEMPTS = 3
PAUSE_S = s3.pause_s  # which `running` takes out
DATA = os.urandom(100_000)
TABLE = pa.table({"x": list(range(5_000)), "text": [f"row {i} {i**3}" for i in range(5_000)]})

ERRORS = {
    "500": {"kind": "error", "status": 500, "code": "InternalError"},
    "503": {"kind": "error", "status": 503, "code": "SlowDown"},
}
WRITE_FAULTS: dict[str, dict[str, Any]] = {
    **ERRORS,
    **{kind: {"kind": kind} for kind in ("drop_request", "cut_request", "lost_response")},
}
READ_FAULTS: dict[str, dict[str, Any]] = {
    **ERRORS,
    **{
        kind: {"kind": kind}
        for kind in ("lost_response", "drop_response", "cut_response", "long_length")
    },
}


def forget_connections() -> None:
    """File systems are kept for each thread, with the endpoint and settings they began with."""
    s3.WholeS3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def running(s3_server: S3) -> Iterator[FaultProxy]:
    """What AWS_ENDPOINT_URL points at while this module runs."""
    with FaultProxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("AWS_MAX_ATTEMPTS", str(ATTEMPTS))
        patch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
        # A client that failed a hundred times fails at once from then on; all tests share one.
        patch.setattr(RetryQuota, "acquire", lambda *_: True)
        patch.setattr(s3, "pause_s", lambda attempt: 0)
        forget_connections()
        yield proxy
        forget_connections()


@pytest.fixture
def proxy(running: FaultProxy) -> Iterator[FaultProxy]:
    """The proxy, without faults yet and with nothing counted."""
    running.requests.clear()
    yield running
    running.faults, running.delay_s = [], 0.0


@pytest.fixture(scope="module")
def store(s3_server: S3) -> Any:
    """SeaweedFS itself, past the proxy."""
    return s3fs.S3FileSystem(endpoint_url=s3_server.endpoint, skip_instance_cache=True)


@pytest.fixture
def folder(s3_server: S3, request: pytest.FixtureRequest) -> str:
    """A prefix of the bucket for one test."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return s3_server.url("faults", name)


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink, row_group_size=1_000)
    return sink.getvalue()


def read_parquet(url: str) -> pa.Table:
    with storage.open_parquet(url) as parquet:
        return parquet.read()


def sizes(url: str) -> dict[str, int]:
    return {entry.url.rpartition("/")[2]: entry.size for entry in listing.list_objects(url)}


# What is read, and what it must be: of a folder that holds `a` and `b` and `table.parquet`.
READS: dict[str, tuple[str, Callable[[str], Any], Any]] = {
    "read_bytes": ("a", storage.read_bytes, DATA),
    "open_parquet": ("table.parquet", read_parquet, TABLE),
    "list_objects": ("", sizes, {"a": len(DATA), "b": 1, "table.parquet": len(parquet_bytes())}),
    "list_glob": ("[ab]", sizes, {"a": len(DATA), "b": 1}),
    "list_names": ("", lambda u: set(listing.list_names(u)), {"a", "b", "table.parquet"}),
    "exists": ("a", storage.exists, True),
}
WRITES: dict[str, Callable[[str, bytes], Any]] = {
    "publish": storage.publish,
    "replace": storage.replace,
    "replace_if_unchanged": storage.replace_if_unchanged,
}


def fill(store: Any, folder: str) -> None:
    for name, data in (("a", DATA), ("b", b"1"), ("table.parquet", parquet_bytes())):
        store.pipe_file(f"{folder}/{name}", data)


def stored(store: Any, url: str) -> bytes | None:
    store.invalidate_cache()
    return bytes(store.cat_file(url)) if store.exists(url) else None


def failure(kind: type[CherryError], call: Callable[..., Any], *args: Any) -> str:
    """The message of a call that fails; it names the first argument and no secret."""
    with pytest.raises(kind) as caught:
        call(*args)
    message = str(caught.value)
    assert message.startswith(f"{args[0]}: cannot be" if kind is InputError else f"{args[0]}: ")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message
    return message


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("fault", READ_FAULTS)
@pytest.mark.parametrize("read", READS)
def test_a_read_succeeds_after_two_faults(
    proxy: FaultProxy, store: Any, folder: str, read: str, fault: str, method: str
) -> None:
    name, call, expected = READS[read]
    fill(store, folder)
    proxy.faults = [Fault(**READ_FAULTS[fault], method=method, times=2)]
    if (read, method) == ("open_parquet", "HEAD") and fault in ("cut_response", "long_length"):
        # An open file has the length that it was opened with: what differs from it is refused.
        assert "no longer exists" in failure(InputError, call, f"{folder}/{name}")
    else:
        assert call(f"{folder}/{name}".rstrip("/")) == expected


@pytest.mark.parametrize("name", ["b.parquet", "c.jsonl"])
def test_a_store_that_does_not_answer_makes_no_shard_a_bad_one(
    proxy: FaultProxy, store: Any, folder: str, name: str
) -> None:
    """`on_bad_shard: skip` is for what is broken, not for what is not given just now."""
    table = pa.table({"instruction": ["a"], "output": ["b"]})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    store.pipe_file(f"{folder}/in/b.parquet", sink.getvalue())
    store.pipe_file(f"{folder}/in/c.jsonl", b'{"instruction": "a", "output": "b"}\n')
    config = InputConfig(path=f"{folder}/in", on_bad_shard="skip")
    proxy.faults = [Fault(**READ_FAULTS["503"], method="GET", key=name)]
    with pytest.raises(StorageError, match=rf"{name}.*run again when the store answers"):
        inputs.open_corpus(config, f"{folder}/out")
    proxy.faults = []
    assert inputs.open_corpus(config, f"{folder}/out").skipped == ()


@pytest.mark.parametrize("fault", READ_FAULTS)
@pytest.mark.parametrize("read", READS)
def test_a_read_that_keeps_failing_is_an_error_and_no_answer(
    proxy: FaultProxy, store: Any, folder: str, read: str, fault: str
) -> None:
    name, call, _ = READS[read]
    fill(store, folder)
    method = "HEAD" if read == "exists" else "GET"
    if read == "exists" and fault not in (*ERRORS, "lost_response"):
        pytest.skip("a HEAD has no body")
    proxy.faults = [Fault(**READ_FAULTS[fault], method=method)]
    message = failure(InputError, call, f"{folder}/{name}".rstrip("/"))
    assert f" after {ATTEMPTS} attempts: " in message
    if fault in ERRORS:
        assert proxy.count(method) == ATTEMPTS  # the layers' attempts are not multiplied
    if fault in ERRORS and method == "GET":
        assert f": {READ_FAULTS[fault]['code']}: Made by a test." in message


@pytest.mark.parametrize("fault", WRITE_FAULTS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_succeeds_after_two_faults(
    proxy: FaultProxy, store: Any, folder: str, write: str, fault: str
) -> None:
    url = f"{folder}/part"
    proxy.faults = [Fault(**WRITE_FAULTS[fault], method="PUT", times=2)]
    done = WRITES[write](url, DATA)
    assert stored(store, url) == DATA
    if write == "publish":  # where the answer was lost, the second try finds the first one's
        assert done is (fault != "lost_response")


@pytest.mark.parametrize("fault", WRITE_FAULTS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_keeps_failing_leaves_what_was_there(
    proxy: FaultProxy, store: Any, folder: str, write: str, fault: str
) -> None:
    url = f"{folder}/part"
    before = None if write == "publish" else b"old"
    if before:
        store.pipe_file(url, before)
    proxy.faults = [Fault(**WRITE_FAULTS[fault], method="PUT")]
    message = failure(StorageError, WRITES[write], url, DATA)
    assert message.startswith(f"{url}: cannot write 100,000 bytes after {ATTEMPTS} attempts: ")
    assert stored(store, url) == (DATA if fault == "lost_response" else before)
    if fault in (*ERRORS, "cut_request"):
        assert proxy.count("PUT") == ATTEMPTS
    if fault in ERRORS:
        assert f": {WRITE_FAULTS[fault]['code']}: Made by a test." in message


def test_a_conflict_is_no_proof_that_the_object_exists(
    proxy: FaultProxy, store: Any, folder: str
) -> None:
    conflict = {"kind": "error", "status": 409, "code": "ConditionalRequestConflict"}
    proxy.faults = [Fault(**conflict, method="PUT", times=2)]
    assert storage.publish(f"{folder}/a", DATA)
    proxy.faults = [Fault(**conflict, method="PUT")]
    message = failure(StorageError, storage.publish, f"{folder}/b", DATA)
    assert f"after {ATTEMPTS} attempts: ConditionalRequestConflict: " in message
    assert (stored(store, f"{folder}/a"), stored(store, f"{folder}/b")) == (DATA, None)


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_two_publishers_end_with_one_whole_object(
    proxy: FaultProxy, store: Any, folder: str, fault: str
) -> None:
    url = f"{folder}/part"
    contents = [b"A" * 300_000, b"B" * 300_000]
    proxy.faults = [Fault(**WRITE_FAULTS[fault], method="PUT", times=2)]
    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(storage.publish, [url, url], contents))
    assert stored(store, url) in contents
    if fault != "lost_response":  # of which the winner may not have heard
        assert sum(won) == 1
    assert all(content == stored(store, url) for content, w in zip(contents, won, strict=True) if w)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Multipart from 10 MiB instead of 100 MiB; returns three parts of content."""
    monkeypatch.setattr(s3fs.S3FileSystem._pipe_file, "__defaults__", (5 << 20, None, "overwrite"))
    return DATA * 120


@pytest.mark.parametrize(
    "fault",
    [
        Fault("error", key="partNumber=2", times=2),
        Fault("drop_request", key="partNumber=3", times=2),
        Fault("cut_request", key="partNumber=1", times=1),
        Fault("lost_response", key="partNumber=2", times=1),
        Fault("error", method="POST", key="?uploads", times=2),
        Fault("error", method="POST", key="?uploadId=", times=2),
        Fault("lost_response", method="POST", key="?uploadId=", times=1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.key.strip('?=')}",
)
def test_an_upload_in_parts_survives(
    proxy: FaultProxy, store: Any, folder: str, small_parts: bytes, fault: Fault
) -> None:
    url = f"{folder}/part"
    proxy.faults = [Fault(**vars(fault))]
    won = storage.publish(url, small_parts)
    assert won is not (fault.kind == "lost_response" and fault.method == "POST")
    assert stored(store, url) == small_parts
    assert not storage.publish(url, small_parts[::-1])
    assert stored(store, url) == small_parts


def test_an_upload_in_parts_that_keeps_failing_leaves_nothing(
    proxy: FaultProxy, store: Any, folder: str, small_parts: bytes
) -> None:
    proxy.faults = [Fault("error", method="PUT", key="partNumber=3")]
    message = failure(StorageError, storage.publish, f"{folder}/part", small_parts)
    assert f"after {ATTEMPTS} attempts: SlowDown" in message
    assert stored(store, f"{folder}/part") is None
    assert uploads.dangling_uploads(folder, older_than_s=0) == []


@pytest.mark.parametrize("times", [2, float("inf")])
def test_a_store_that_does_not_answer_in_time_is_asked_again(
    proxy: FaultProxy, store: Any, folder: str, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, folder)
    monkeypatch.setattr(s3.WholeS3FileSystem, "read_timeout", 0.15)
    forget_connections()
    proxy.faults = [Fault("delay", seconds=0.4, method="GET", times=times)]
    if times == 2:
        assert storage.read_bytes(f"{folder}/a") == DATA
    else:
        message = failure(InputError, storage.read_bytes, f"{folder}/a")
        assert f"after {ATTEMPTS} attempts: Read timeout" in message
    assert proxy.count("GET") == ATTEMPTS
    forget_connections()


@pytest.mark.parametrize("times", [2, float("inf")])
def test_a_page_of_a_listing_is_not_left_out(
    proxy: FaultProxy, store: Any, folder: str, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = s3fs.S3FileSystem._call_s3

    async def in_small_pages(self: Any, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        if method == "list_objects_v2":
            kwargs["MaxKeys"] = 2
        return await call(self, method, *akwarglist, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", in_small_pages)
    for name in "abcde":
        store.pipe_file(f"{folder}/{name}", b"x")
    for read in (sizes, listing.list_names):
        for fault in READ_FAULTS.values():
            proxy.faults = [Fault(**fault, key="continuation-token", times=times)]
            if times == 2:
                assert sorted(read(folder)) == list("abcde")
            else:
                failure(InputError, read, folder)
    assert proxy.count(key="continuation-token")


def test_a_glob_fails_where_a_directory_within_it_cannot_be_listed(
    proxy: FaultProxy, store: Any, folder: str
) -> None:
    for name in ("x/a", "y/b"):
        store.pipe_file(f"{folder}/{name}", b"1")
    assert sizes(f"{folder}/*/*") == {"a": 1, "b": 1}
    assert sizes(f"{folder}/nothing/*/*") == {}
    proxy.faults = [Fault("error", key="/y/")]
    failure(InputError, sizes, f"{folder}/*/*")


def test_a_bucket_that_does_not_answer_is_not_taken_for_a_missing_one(
    proxy: FaultProxy, s3_server: S3
) -> None:
    proxy.faults = [Fault("error")]
    assert "cannot be listed after" in failure(InputError, listing.list_objects, s3_server.url())


def test_an_object_replaced_before_it_is_read_is_read_as_it_is_then(
    proxy: FaultProxy, store: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{folder}/LATEST.json"
    store.pipe_file(url, b"long and old")
    info = s3fs.S3FileSystem._info
    versions = [b"2nd", b"third"]

    async def replaced_after(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = await info(self, *args, **kwargs)
        if versions:
            await store._pipe_file(url, versions.pop(0))
        return found

    monkeypatch.setattr(s3.WholeS3FileSystem, "_info", replaced_after)
    assert storage.read_bytes(url) == b"third"


def test_an_open_object_that_is_replaced_is_an_error(
    proxy: FaultProxy, store: Any, folder: str
) -> None:
    url = f"{folder}/table.parquet"
    fill(store, folder)

    def read_replaced(url: str) -> None:
        with storage.open_parquet(url) as parquet:
            store.pipe_file(url, parquet_bytes()[::-1])
            parquet.read()

    assert "no longer exists" in failure(InputError, read_replaced, url)


def test_a_fault_while_reading_is_not_taken_for_a_bad_file(
    proxy: FaultProxy, store: Any, folder: str
) -> None:
    """Else `input.on_bad_shard: skip` would be the advice for a store that is down."""
    fill(store, folder)
    proxy.faults = [Fault("error", method="GET")]
    message = failure(InputError, read_parquet, f"{folder}/table.parquet")
    assert "Parquet" not in message


def test_a_store_that_is_down_is_told_from_a_shard_that_is_bad(
    proxy: FaultProxy, store: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `input.on_bad_shard: skip` would leave out good shards."""
    fill(store, folder)
    url = f"{folder}/table.parquet"
    unit: Any = SimpleNamespace(shard_url=url, columns=None, version="")

    def tables(units: list[Any]) -> Iterator[Any]:
        yield read_parquet(url)

    monkeypatch.setattr(tokenising, "read_units", tables)

    def prepare() -> None:
        tokenising.prepare(unit, None)  # type: ignore[arg-type]

    proxy.faults = [Fault("error", method="GET")]
    with pytest.raises(StorageError, match="run again"):
        prepare()
    proxy.faults = []
    good = parquet_bytes()
    store.pipe_file(url, good[:4] + b"\xff" * (len(good) // 2) + good[4 + len(good) // 2 :])
    with pytest.raises(ShardError):
        prepare()
    store.rm(url)
    with pytest.raises(ShardError):
        prepare()


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_a_file_is_fetched_whole(
    proxy: FaultProxy, store: Any, folder: str, fault: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(s3, "_RANGE_BYTES", 9_000)  # twelve ranges, four at a time
    fill(store, folder)
    fs, path = storage.filesystem(f"{folder}/a")
    proxy.faults = [Fault(**READ_FAULTS[fault], method="GET", times=2)]
    fs.get_file(path, str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == DATA
    proxy.faults = [Fault(**READ_FAULTS[fault], method="GET")]
    with pytest.raises(InputError), storage_faults.reading(path):
        fs.get_file(path, str(tmp_path / "b"))


def test_a_stream_of_lines_does_not_end_early(proxy: FaultProxy, store: Any, folder: str) -> None:
    url = f"{folder}/rows.jsonl"
    lines = [b"%d\n" % number for number in range(1_000)]
    store.pipe_file(url, b"".join(lines))
    fs, path = storage.filesystem(url)
    proxy.faults = [Fault("cut_response", method="GET", times=2)]
    with fs.open(path, "rb") as handle:
        assert list(handle) == lines
    proxy.faults = [Fault("cut_response", method="GET")]
    with pytest.raises(OSError, match="got 1,945 bytes of 0 to 3,890"), fs.open(path) as handle:
        list(handle)


def test_attempts_and_pauses_are_bounded(
    s3_server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def settings() -> tuple[str, int, float, float]:
        config = s3.WholeS3FileSystem(skip_instance_cache=True).s3.meta.config
        retries = config.retries
        times = (config.connect_timeout, config.read_timeout)
        return (retries["mode"], retries["total_max_attempts"], *times)

    for name in ("AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert settings() == ("standard", 6, 5, 15)
    profile = tmp_path / "config"
    profile.write_text("[default]\nmax_attempts = 4\nretry_mode = legacy\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
    assert settings() == ("legacy", 4, 5, 15)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_RETRY_MODE", "adaptive")
    assert settings() == ("adaptive", 2, 5, 15)

    for attempt, longest in enumerate([1, 2, 4, 8, 16, 20, 20], start=1):
        pauses = {PAUSE_S(attempt) for _ in range(200)}
        assert len(pauses) == 200  # jitter
        assert 0 <= min(pauses)
        assert longest / 2 < max(pauses) <= longest


def test_a_store_far_away_is_only_slower(proxy: FaultProxy, store: Any, folder: str) -> None:
    proxy.delay_s = 0.02
    started = time.monotonic()
    assert storage.publish(f"{folder}/a", DATA)
    assert storage.read_bytes(f"{folder}/a") == DATA
    assert time.monotonic() - started > 3 * proxy.delay_s
    assert [method for method, _ in proxy.requests] == ["PUT", "HEAD", "GET"]


def test_only_the_row_groups_of_wanted_rows_travel(
    proxy: FaultProxy, store: Any, folder: str
) -> None:
    noise = [os.urandom(5_000) for _ in range(100)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": noise, "other": noise}), sink, row_group_size=10)
    storage.publish(f"{folder}/shard", sink.getvalue())
    proxy.bytes_sent = 0
    rows = rows_module.take_rows(
        ObjectInfo(f"{folder}/shard", 0, ""), np.array([3, 5, 47]), {"text"}
    )
    assert rows["text"].to_pylist() == [noise[3], noise[5], noise[47]]
    footer = 66_000  # its last 64 KiB are read at once
    assert 2 * 10 * 5_000 < proxy.bytes_sent < 2 * 10 * 5_000 + footer  # of 1,000,000


def test_a_large_row_group_is_read_no_further_than_the_rows_wanted(
    proxy: FaultProxy, store: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_LARGE_ROW_GROUP", 1 << 20)
    monkeypatch.setattr(storage, "_READ_AHEAD", 1 << 16)
    monkeypatch.setattr(rows_module, "_ROWS_PER_BATCH", 10)
    noise = [os.urandom(5_000) for _ in range(400)]
    sink = io.BytesIO()
    table = pa.table({"text": noise, "other": noise})
    pq.write_table(table, sink, use_dictionary=False, data_page_size=20_000, write_batch_size=4)
    storage.publish(f"{folder}/shard", sink.getvalue())
    proxy.bytes_sent = 0
    file = ObjectInfo(f"{folder}/shard", 0, "")
    rows = rows_module.take_rows(file, np.array([3, 25]), {"text"})
    assert rows["text"].to_pylist() == [noise[3], noise[25]]
    assert 25 * 5_000 < proxy.bytes_sent < 400_000  # of 4,000,000


def test_remove_on_s3(proxy: FaultProxy, store: Any, folder: str) -> None:
    fill(store, folder)
    proxy.faults = [Fault("error", method="DELETE", times=2)]
    storage.remove(f"{folder}/a")
    storage.remove(f"{folder}/a")  # is gone already
    assert sorted(listing.list_names(folder)) == ["b", "table.parquet"]
    proxy.faults = [Fault("error", method="DELETE")]
    message = failure(StorageError, storage.remove, f"{folder}/b")
    assert f"cannot be removed after {ATTEMPTS} attempts: SlowDown" in message


def test_unfinished_uploads_are_found_and_given_up(
    proxy: FaultProxy, store: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, key, _ = store.split_path(folder)
    for name in ("a", "b", "b", "deep/c"):
        store.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{key}/{name}")
    store.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{key}-other/d")
    call = s3fs.S3FileSystem._call_s3

    async def in_small_pages(self: Any, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        if method == "list_multipart_uploads":
            kwargs["MaxUploads"] = 3
        return await call(self, method, *akwarglist, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", in_small_pages)
    found = uploads.dangling_uploads(folder, older_than_s=0)
    assert [u.url.removeprefix(folder) for u in found] == ["/a", "/b", "/b", "/deep/c"]
    assert proxy.count("GET") == 2  # pages
    assert all(abs(time.time() - upload.started) < 60 for upload in found)
    assert uploads.dangling_uploads(folder, older_than_s=3600) == []

    proxy.faults = [Fault("error", method="GET")]
    failure(InputError, uploads.dangling_uploads, folder, 0)
    proxy.faults = []
    for upload in [*found, found[0]]:  # one that is gone is fine
        uploads.abort_upload(upload)
    assert uploads.dangling_uploads(folder, older_than_s=0) == []
    assert len(uploads.dangling_uploads(f"{folder}-other", older_than_s=0)) == 1


def test_temporary_files_of_killed_writers_are_found(tmp_path: Path) -> None:
    killed = tmp_path / "scores" / f".{'0a' * 16}.tmp"
    storage.publish(str(tmp_path / "scores/part.parquet"), b"x")
    for path in (killed, tmp_path / f".{'1b' * 16}.tmp", tmp_path / ".mine.tmp"):
        path.write_bytes(b"half")
    for path in (killed, tmp_path / ".mine.tmp", tmp_path / "scores/part.parquet"):
        os.utime(path, (0, time.time() - 7200))
    (found,) = uploads.dangling_uploads(str(tmp_path), older_than_s=3600)
    assert (found.url, found.upload_id) == (str(killed), "")
    uploads.abort_upload(found)
    uploads.abort_upload(found)
    assert not killed.exists()
    storage.remove(str(tmp_path / "scores/part.parquet"))
    storage.remove(str(tmp_path / "scores/part.parquet"))
    assert listing.list_names(str(tmp_path / "scores")) == {}
    assert uploads.dangling_uploads("memory://nothing", older_than_s=0) == []
