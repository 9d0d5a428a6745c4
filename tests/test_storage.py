"""Storage: publish once and whole, point LATEST.json, list, and name what is wrong."""

import math
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, S3

from pipeline import listing, storage, storage_faults
from pipeline.errors import InputError, StorageError

NUM_WRITERS = 16


def race_to_publish(url: str, size: int) -> tuple[list[bool], list[bytes]]:
    """Sixteen threads publish at one moment; returns who won, and what each wrote."""
    contents = [bytes([65 + writer]) * size for writer in range(NUM_WRITERS)]
    start = Barrier(NUM_WRITERS)

    def write(content: bytes) -> bool:
        start.wait()
        return storage.publish(url, content)

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        return list(pool.map(write, contents)), contents


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_the_first_of_sixteen_local_writers_wins(tmp_path: Path, size: int) -> None:
    url = str(tmp_path / "scores/fp/part.parquet")
    won, contents = race_to_publish(url, size)
    assert sum(won) == 1
    assert storage.read_bytes(url) == contents[won.index(True)]
    assert files_under(tmp_path) == ["scores/fp/part.parquet"]


def test_publishing_over_an_object_changes_nothing(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    assert storage.publish(url, b"first")
    inode = os.stat(url).st_ino
    assert not storage.publish(url, b"second")
    assert (storage.read_bytes(url), os.stat(url).st_ino) == (b"first", inode)
    assert files_under(tmp_path) == ["a"]


def test_a_local_write_that_fails_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    url = str(tmp_path / "file/part.parquet")  # under a file there is no directory
    with pytest.raises(StorageError) as caught:
        storage.publish(url, b"abc")
    assert f"{url}: cannot write 3 bytes: " in str(caught.value)
    assert files_under(tmp_path) == ["file"]


def test_a_local_write_beyond_the_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys; from pipeline import errors, storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for write in (storage.publish, storage.replace):\n"
        "    try: write(sys.argv[1], b'x' * 2000)\n"
        "    except errors.StorageError as err: print(err)\n"
    )
    url = str(tmp_path / "part.parquet")
    done = subprocess.run(
        [sys.executable, "-c", script, url], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout.count(f"{url}: cannot write 2,000 bytes: [Errno 27]") == 2, done.stderr
    assert files_under(tmp_path) == []


def test_replace_overwrites_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    url = str(tmp_path / "deep/a")
    storage.replace(url, b"first")
    storage.replace(url, b"second")
    assert storage.read_bytes(url) == b"second"
    assert files_under(tmp_path) == ["deep/a"]


def test_a_reader_sees_one_whole_content_while_it_is_replaced(tmp_path: Path) -> None:
    url = str(tmp_path / "LATEST.json")
    contents = [bytes([65 + writer]) * 200_000 for writer in range(8)]
    storage.replace_if_unchanged(url, contents[0])
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(storage.replace_if_unchanged, url, c) for c in contents * 5]
        seen = {storage.read_bytes(url) for _ in range(100)}
        for write in writes:
            write.result()
    assert seen <= set(contents)
    assert files_under(tmp_path) == ["LATEST.json"]


def test_the_one_object_that_moves_moves_in_any_store() -> None:
    url = "memory://cherry-latest/LATEST.json"  # has neither ETags nor conditional writes
    for content in (b"first", b"second"):
        storage.replace_if_unchanged(url, content)
        assert storage.read_bytes(url) == content


def test_a_bit_that_flipped_in_a_part_is_noticed(tmp_path: Path) -> None:
    url = str(tmp_path / "part.parquet")
    options = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(pa.table({"x": [0.25] * 3 + [0.5]}), url, compression="none", **options)
    data = bytearray(Path(url).read_bytes())
    data[data.index(struct.pack("<d", 0.5)) + 6] ^= 1  # 0.5 becomes 0.53125
    Path(url).write_bytes(data)
    with pytest.raises(InputError, match=r"part\.parquet: cannot be read.*CRC"):
        with storage.open_parquet(url) as parquet:
            parquet.read()


def test_links_are_followed_to_files_and_directories(tmp_path: Path) -> None:
    for name in ("in/a", "in/deep/b", "out/c", "out/deep/d", "other/e"):
        storage.publish(str(tmp_path / name), b"xyz")
    links = {"in/to-file": "other/e", "in/to-folder": "out", "in/circle": "in", "out/back": "in"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)

    def listed(url: str) -> list[str]:
        entries = listing.list_objects(str(tmp_path / url))
        assert all(entry.size == 3 and entry.version for entry in entries)
        return [str(Path(entry.url).relative_to(tmp_path)) for entry in entries]

    below = ["in/a", "in/deep/b", "in/to-file"]
    assert listed("in") == [*below, "in/to-folder/c", "in/to-folder/deep/d"]
    assert listed("in/to-*/*") == ["in/to-folder/c"]
    assert listed("in/**") == below  # which follows no links to directories
    (tmp_path / "in/broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"in/broken: there is no such file"):
        listed("in")


def test_list_objects_takes_a_file_a_directory_or_a_glob(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        storage.publish(str(tmp_path / name), b"xyz")

    def listed(url: Path) -> list[tuple[str, int]]:
        return [
            (e.url.removeprefix(f"{tmp_path}/"), e.size) for e in listing.list_objects(str(url))
        ]

    assert listed(tmp_path) == [("a", 3), ("b", 3), ("deep/c", 3)]
    assert listed(tmp_path / "a") == [("a", 3)]
    assert listed(tmp_path / "*") == [("a", 3), ("b", 3)]
    assert listed(tmp_path / "dee?") == [("deep/c", 3)]
    assert listed(tmp_path / "**/c") == [("deep/c", 3)]
    assert listed(tmp_path / "nothing-*") == []


def test_local_links_are_the_files_they_lead_to(tmp_path: Path) -> None:
    """Every file of a Hugging Face snapshot is one."""
    storage.publish(str(tmp_path / "blobs/1"), b"xyz")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/a.parquet").symlink_to(tmp_path / "blobs/1")
    for url in (f"{tmp_path}/snapshot", f"{tmp_path}/snapshot/a*", f"{tmp_path}/snapshot/**/a*"):
        (entry,) = listing.list_objects(url)
        assert (entry.url, entry.size) == (f"{tmp_path}/snapshot/a.parquet", 3)
        assert entry.version == listing.list_objects(f"{tmp_path}/snapshot/a.parquet")[0].version
    (tmp_path / "snapshot/gone.parquet").symlink_to(tmp_path / "blobs/2")
    with pytest.raises(InputError, match=r"gone\.parquet: there is no such file"):
        listing.list_objects(f"{tmp_path}/snapshot")


def test_a_version_changes_with_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    os.utime(path, ns=(0, 1_000_000_000))
    (before,) = listing.list_objects(str(path))
    assert listing.list_objects(str(path)) == [before]
    path.write_bytes(b"2")
    os.utime(path, ns=(0, 2_000_000_000))
    (after,) = listing.list_objects(str(path))
    assert before.version != after.version


def test_list_names_is_flat_and_empty_where_nothing_is(tmp_path: Path) -> None:
    assert listing.list_names(str(tmp_path / "absent")) == {}
    for name in ("a.parquet", "b.parquet", "deep/c.parquet"):
        storage.publish(str(tmp_path / name), b"x")
    assert sorted(listing.list_names(str(tmp_path))) == ["a.parquet", "b.parquet"]


def test_join_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.join("s3://b/a/", "x", "y") == "s3://b/a/x/y"
    assert storage.absolute("s3://b/a/") == "s3://b/a"
    assert storage.absolute("a/") == f"{tmp_path}/a"
    assert storage.absolute("./a/../b") == f"{tmp_path}/b"
    assert storage.absolute("file:///a/b") == "/a/b"
    assert storage.is_local("a")
    assert not storage.is_local("memory://a")


def test_a_url_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"ftpx://host/a: no file system for this URL"):
        listing.list_objects("ftpx://host/a")


def test_errors_of_any_backend_are_storages_and_no_others() -> None:
    class HttpError(Exception):
        """As gcsfs has it."""

    HttpError.__module__ = "gcsfs.retry"
    with (
        pytest.raises(InputError, match="gs://b/a: cannot be read: 401"),
        storage_faults.reading("gs://b/a"),
    ):
        raise HttpError("401")
    with pytest.raises(StorageError, match="gs://b/a: not written: 401"):
        with storage_faults.changing("gs://b/a", "not written"):
            raise HttpError("401")
    with pytest.raises(TypeError), storage_faults.reading("gs://b/a"):
        raise TypeError("a mistake of ours")


def test_reading_what_is_not_there_names_it(tmp_path: Path) -> None:
    url = str(tmp_path / "absent")
    for read in (storage.read_bytes, listing.list_objects):
        with pytest.raises(InputError, match="absent: there is no such file, directory or bucket"):
            read(url)
    assert not storage.exists(url)


def test_a_parquet_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not this")
    with (
        pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file: .* skip"),
        storage.open_parquet(str(path)),
    ):
        pass


@pytest.mark.s3
@pytest.mark.parametrize("size", [1, 3_000_000])
def test_the_first_of_sixteen_s3_writers_wins(s3_server: S3, size: int) -> None:
    url = s3_server.url(f"race-{size}", "part.parquet")
    won, contents = race_to_publish(url, size)
    assert sum(won) == 1
    assert s3_server.filesystem().cat_file(url) == contents[won.index(True)]
    assert list(listing.list_names(s3_server.url(f"race-{size}"))) == ["part.parquet"]


@pytest.mark.s3
def test_publishing_over_an_s3_object_changes_nothing(s3_server: S3) -> None:
    url = s3_server.url("once")
    assert storage.publish(url, b"first")
    assert not storage.publish(url, b"second")
    assert storage.read_bytes(url) == b"first"


@pytest.mark.s3
def test_replace_if_unchanged_creates_moves_and_survives_a_race(s3_server: S3) -> None:
    url = s3_server.url("LATEST.json")
    storage.replace_if_unchanged(url, b"1")
    assert storage.read_bytes(url) == b"1"
    storage.replace_if_unchanged(url, b"2")
    assert storage.read_bytes(url) == b"2"
    contents = [b"%d" % number for number in range(10, 10 + NUM_WRITERS)]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(lambda content: storage.replace_if_unchanged(url, content), contents))
    assert storage.read_bytes(url) in contents


@pytest.mark.s3
def test_s3_lists_files_directories_and_globs(s3_server: S3) -> None:
    for name in ("b", "a", "deep/c"):
        storage.publish(s3_server.url("listing", name), name.encode())

    def listed(*names: str) -> list[str]:
        base = s3_server.url("listing") + "/"
        entries = listing.list_objects(s3_server.url("listing", *names))
        return [entry.url.removeprefix(base) for entry in entries]

    assert listed() == ["a", "b", "deep/c"]
    assert listed("a") == ["a"]
    assert listed("*") == ["a", "b"]
    assert listed("dee?") == ["deep/c"]
    assert listed("**") == ["a", "b", "deep/c"]
    assert sorted(listing.list_names(s3_server.url("listing"))) == ["a", "b"]
    assert listing.list_names(s3_server.url("listing-absent")) == {}


@pytest.mark.s3
def test_an_s3_version_is_the_etag_of_the_content(s3_server: S3) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        storage.publish(s3_server.url("etags", name), content)
    a, b, c = (entry.version for entry in listing.list_objects(s3_server.url("etags")))
    assert a == b != c
    assert '"' not in a
    assert listing.list_names(s3_server.url("etags")) == {"a": a, "b": b, "c": c}


@pytest.mark.s3
def test_parquet_opens_on_s3(s3_server: S3) -> None:
    url = s3_server.url("table.parquet")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1, 2]}), sink)
    storage.publish(url, sink.getvalue().to_pybytes())
    with storage.open_parquet(url) as parquet:
        assert parquet.read()["x"].to_pylist() == [1, 2]


@pytest.mark.s3
def test_what_is_missing_on_s3_is_named(s3_server: S3) -> None:
    for url in ("s3://no-such-bucket/corpus", s3_server.url("no-such-key")):
        for read in (storage.read_bytes, listing.list_objects):
            with pytest.raises(InputError) as caught:
                read(url)
            expected = f"{url}: there is no such file, directory or bucket. Check the spelling."
            assert str(caught.value) == expected
        assert not storage.exists(url)


_ASK = """
import sys
from pipeline import errors, listing, storage
url = sys.argv[1]
calls = [storage.read_bytes, listing.list_objects, listing.list_names, storage.exists]
calls += [lambda u: storage.publish(u, b"x"), lambda u: storage.replace_if_unchanged(u, b"x")]
for call in calls:
    try:
        print("DONE", call(url))
    except errors.CherryError as err:
        print(type(err).__name__, str(err))
"""


def ask(url: str, **environment: str | None) -> tuple[list[str], str]:
    """What storage says about a URL in a process of another environment; and its stderr."""
    changed = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent"}
    for name, value in environment.items():
        changed.pop(name, None)
        if value is not None:
            changed[name] = value
    done = subprocess.run(
        [sys.executable, "-c", _ASK, url],
        env=changed, cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout.splitlines(), done.stderr


@pytest.mark.s3
@pytest.mark.parametrize("name", ["denied/there", "denied", "denied/*"])
def test_wrong_keys_are_a_permission_error_that_names_the_fix(s3_server: S3, name: str) -> None:
    s3_server.filesystem().pipe_file(s3_server.url("denied/there"), b"x")
    url = s3_server.url(name)
    said, stderr = ask(url, AWS_SECRET_ACCESS_KEY="wrong-secret")
    reads, writes = said[:4], said[4:]
    assert len(said) == 6, stderr
    for line in reads:
        assert line.startswith(f"InputError {url}: permission denied"), line
        assert "check the key, the bucket's policy and AWS_ENDPOINT_URL" in line
    for line in writes:
        assert line.startswith(f"StorageError {url}: cannot write"), line
    assert "wrong-secret" not in "\n".join(said) + stderr


@pytest.mark.s3
def test_no_keys_at_all_are_named(s3_server: S3) -> None:
    url = s3_server.url("denied/there")
    said, stderr = ask(url, AWS_SECRET_ACCESS_KEY=None, AWS_ACCESS_KEY_ID=None)
    assert len(said) == 6, stderr
    for line in said[:4]:
        assert line.startswith(f"InputError {url}: no credentials were found"), line
        assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line


def test_an_endpoint_that_does_not_answer_is_named() -> None:
    said, stderr = ask(
        "s3://bucket/a",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="k",
        AWS_SECRET_ACCESS_KEY="s",
        AWS_MAX_ATTEMPTS="1",
    )
    assert len(said) == 6, stderr
    for line in said:
        assert "s3://bucket/a: " in line
        assert "http://127.0.0.1:9" in line
        assert not line.startswith("DONE")


def test_times_of_all_stores_are_understood() -> None:
    moment = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    expected = moment.timestamp()
    assert listing._modified({"LastModified": moment}) == expected  # S3
    assert listing._modified({"mtime": expected}) == expected  # files
    assert listing._modified({"updated": "2024-05-06T07:08:09.000Z"}) == expected  # Google
    assert listing._modified({}) == math.inf
