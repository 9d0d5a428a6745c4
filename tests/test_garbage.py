"""`cherry gc`: what no input names goes, when asked, and nothing that might still serve."""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROWS, S3, write_parquet
from fsspec import AbstractFileSystem
from typer.testing import CliRunner, Result

from pipeline import garbage, run, storage, uploads
from pipeline.cli import app
from pipeline.config import parse
from pipeline.config_training import ExperienceConfig
from pipeline.errors import InputError
from pipeline.garbage import Garbage
from pipeline.input_paths import reach_of
from pipeline.job import check, plan
from pipeline.listing import ObjectInfo

pytestmark = pytest.mark.ray
DAY_S = 24 * 3600


@pytest.fixture(scope="module")
def scored(
    ray_local: None, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Three shards, scored; the middle one was then replaced by a longer one and scored too.

    Scored once, in a folder that each test gets back as it was, from the second one: what a part is
    called follows from where its shard lies.
    """
    folder, kept = tmp_path_factory.mktemp("garbage"), tmp_path_factory.mktemp("kept")
    for number, rows in enumerate((ROWS[:15], ROWS[15:30], ROWS[30:])):
        write_parquet(folder / f"corpus/shard-{number}.parquet", rows)
    run.score(_config(folder, model_dir))
    write_parquet(folder / "corpus/shard-1.parquet", ROWS[15:31])
    run.score(_config(folder, model_dir))
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    return folder, kept


def _config(folder: Path, model_dir: Path) -> Any:
    return parse(
        {
            "input": {"path": str(folder / "corpus")},
            "output": str(folder / "out"),
            "model": {"path": str(model_dir), "dtype": "float32"},
            "score": {"unit_rows": 100},
        }
    )


@pytest.fixture
def config(scored: tuple[Path, Path], model_dir: Path) -> Any:
    folder, kept = scored
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    return _config(folder, model_dir)


@pytest.fixture
def corpus(config: Any) -> Path:
    return Path(config.input.path)


def gc(config: Any, *options: str) -> Result:
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return CliRunner().invoke(app, ["gc", str(path), *options])


def found(config: Any, *options: str) -> dict[str, Any]:
    result = gc(config, "--json", *options)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def parts(config: Any) -> set[Path]:
    return set(Path(config.output).glob("scores/*/*.parquet"))


def age(config: Any) -> None:
    """Two days pass."""
    then = time.time() - 2 * DAY_S
    for path in Path(config.output).rglob("*"):
        os.utime(path, (then, then))


def test_what_is_no_part_stays_whatever_is_asked(config: Any) -> None:
    """As a corpus that somebody keeps under a folder of the output."""
    theirs = Path(config.output) / "scores/theirs/shard-0.parquet"
    write_parquet(theirs, ROWS[:3])
    age(config)
    assert str(theirs) not in found(config, "--all")["parts"]
    found(config, "--all", "--delete", "--force")
    assert theirs.exists()


def test_a_stale_part_is_listed_and_goes_when_asked(config: Any) -> None:
    age(config)
    before = parts(config)
    listed = found(config)
    assert (len(listed["parts"]), listed["parts_total"], listed["deleted"]) == (1, 4, False)
    assert parts(config) == before
    assert found(config, "--delete")["deleted"] is True
    assert before - parts(config) == {Path(listed["parts"][0])}
    again = run.score(config).summary
    assert (again.units_scored, again.rows) == (0, len(ROWS) + 1)


def test_what_is_younger_than_a_day_is_spared(config: Any) -> None:
    listed = found(config, "--delete")
    assert (listed["parts"], listed["spared_parts"]) == ([], 1)
    assert len(parts(config)) == 4


def test_over_half_of_the_parts_needs_force(config: Any, corpus: Path) -> None:
    (corpus / "shard-0.parquet").unlink()
    (corpus / "shard-1.parquet").unlink()
    age(config)
    refused = gc(config, "--delete")
    assert refused.exit_code == 2
    assert "3 of 4 parts in scores would go, more than half" in refused.stderr
    assert len(parts(config)) == 4
    assert found(config, "--delete", "--force")["deleted"] is True
    assert len(parts(config)) == 1


def test_parts_that_units_still_to_score_may_draw_on_need_force(config: Any, corpus: Path) -> None:
    write_parquet(corpus / "shard-2.parquet", ROWS[30:] + ROWS[:1])
    age(config)
    refused = gc(config, "--delete")
    assert refused.exit_code == 2
    assert "1 unit of the input without a part yet" in refused.stderr
    assert len(parts(config)) == 4


def test_an_empty_input_is_refused(config: Any, corpus: Path) -> None:
    for path in corpus.iterdir():
        path.unlink()
    age(config)
    assert gc(config, "--delete", "--force").exit_code == 2
    assert len(parts(config)) == 4


def test_other_settings_are_left_alone_unless_all(config: Any) -> None:
    other = config.model_copy(update={"score": config.score.model_copy(update={"max_length": 64})})
    run.score(other)
    age(config)
    assert len(found(config)["parts"]) == 1
    assert len(found(config, "--all")["parts"]) == 4


def test_parts_of_another_input_stay_unless_all(config: Any, corpus: Path) -> None:
    """Nobody can tell whether its config still wants them, and they were paid for."""
    other = corpus.parent / "other"
    write_parquet(other / "shard-0.parquet", ROWS[:15])
    theirs = config.model_copy(
        update={"input": config.input.model_copy(update={"path": str(other)})}
    )
    run.score(theirs)
    age(config)
    before = parts(config)
    ours = found(config, "--delete")
    assert (len(ours["parts"]), ours["parts_of_other_inputs"]) == (1, 1)
    assert len(before - parts(config)) == 1
    assert run.score(theirs).summary.units_scored == 0
    age(config)
    assert "1 part is another input's or damaged: left alone" in gc(config).stdout
    assert len(found(config, "--all")["parts"]) == 1


@pytest.mark.parametrize(
    ("path", "url", "reached"),
    [
        ("/d", "/d/a.parquet", True),
        ("/d/", "/d/deep/a.parquet", True),
        ("/d", "/dd/a.parquet", False),
        ("/d/a.jsonl", "/d/a.jsonl#3", True),
        ("/d/*.parquet", "/d/gone.parquet", True),
        ("/d/*.parquet", "/d/gone.jsonl#0", False),
        ("/d/x*", "/d/xy/a.parquet", True),
        ("/d/**/a.parquet", "/d/x/y/a.parquet", True),
        ("/d/**/train-*.parquet", "/d/x/train-0.parquet", True),
        ("/d/**/train-*.parquet", "/d/x/test-0.parquet", False),
        ("/d/**/part-*", "/d/x/part-v2/a.parquet", True),
        ("s3://b/d/**/part-*", "s3://b/d/x/part-0.parquet", True),
        ("s3://b/d/**/part-*", "s3://b/d/x/part-v2/a.parquet", False),
        ("/d/*", "/d/a.parquet", True),
        ("/d/*", "/d/sub/a.parquet", False),
        ("/d", "/d/_raw/a.parquet", False),
        ("/d/_raw", "/d/_raw/a.parquet", True),
        ("/d/_a.parquet", "/d/_a.parquet", True),
        ("/d/c#1", "/d/c#1/a.parquet", True),
        ("hdfs://head:8020/d", "hdfs:///d/a.parquet", True),
        ("/d/x/**", "/d/y/a.parquet", False),
        ("s3a://b/d", "s3://b/d/a.parquet", True),
        ("s3://b/d", "s3://bb/d/a.parquet", False),
    ],
)
def test_what_a_path_reaches_is_its_own(
    path: str, url: str, reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.startswith("hdfs"):  # whose class wants a cluster to be made
        monkeypatch.setattr(
            storage, "filesystem", lambda url: (_Named("hdfs"), re.sub("hdfs://[^/]*", "", url))
        )
    assert reach_of([path])(url) == reached


class _Named(AbstractFileSystem):  # type: ignore[misc]
    cachable = False

    def __init__(self, protocol: str) -> None:
        super().__init__()
        self.protocol = protocol


def test_another_input_does_not_make_a_mistake_look_small(config: Any, corpus: Path) -> None:
    other = corpus.parent / "other"
    write_parquet(other / "shard-0.parquet", ROWS[:15])
    elsewhere = config.input.model_copy(update={"path": str(other)})
    for first in (1, 2, 3):
        write_parquet(other / f"shard-{first}.parquet", ROWS[first : first + 5])
    run.score(config.model_copy(update={"input": elsewhere}))
    (corpus / "shard-0.parquet").unlink()
    (corpus / "shard-1.parquet").unlink()
    age(config)
    refused = gc(config, "--delete")
    assert "3 of 4 parts in scores would go, more than half" in refused.stderr


def test_what_cannot_be_read_for_now_is_not_another_input(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(config)

    @contextmanager
    def forbidden(url: str) -> Iterator[None]:
        raise InputError(f"{url}: permission denied") from PermissionError(url)
        yield

    monkeypatch.setattr(garbage.storage, "open_parquet", forbidden)
    with pytest.raises(InputError, match="permission denied"):
        garbage._shard_of(str(next(iter(parts(config)))))


def test_scores_stay_where_no_model_says_whose_they_are(config: Any) -> None:
    """With brief experience that is yet to come, all scores of the output would be strays."""
    yet_to_come = config.model_copy(update={"experience": ExperienceConfig(clusters=3)})
    age(config)
    before = parts(config)
    assert found(yet_to_come, "--all", "--delete", "--force")["parts"] == []
    assert parts(config) == before


def test_embeddings_that_stay_do_not_let_scores_go(tmp_path: Path) -> None:
    going = [
        ObjectInfo(str(tmp_path / f"out/scores/{'0' * 16}/{i:032x}.parquet"), 1, "", 0.0)
        for i in range(4)
    ]
    looked_at = Counter(scores=7, embeddings=100)
    with pytest.raises(InputError, match="4 of 7 parts in scores would go, more than half"):
        garbage.delete(
            Garbage(going, [], looked_at, num_spared=0, num_elsewhere=0, num_pending=0, skipped=())
        )


def test_temporary_files_of_killed_writers_go(config: Any) -> None:
    left = Path(config.output, "scores", f".{'0' * 32}.tmp")
    left.write_bytes(b"half a part")
    age(config)
    fresh = left.with_name(f".{'1' * 32}.tmp")
    fresh.write_bytes(b"being written")
    assert found(config, "--delete")["uploads"] == [str(left)]
    assert (left.exists(), fresh.exists()) == (False, True)


def test_people_see_how_much_and_what(config: Any) -> None:
    age(config)
    text = gc(config).stdout
    assert "1 of 4 parts" in text
    assert "could go; delete with --delete" in text
    assert found(config)["parts"][0] in text


def test_people_see_that_there_is_nothing_to_delete(config: Any) -> None:
    for options in ((), ("--delete",)):
        text = gc(config, *options).stdout
        assert "nothing to delete: 4 parts, and no remains" in text


@pytest.mark.s3
def test_dangling_multipart_uploads_go(s3_server: S3) -> None:
    output = s3_server.url("garbage")
    fs = s3_server.filesystem()
    fs.call_s3("create_multipart_upload", Bucket=s3_server.bucket, Key="garbage/scores/x.parquet")
    fs.call_s3("create_multipart_upload", Bucket=s3_server.bucket, Key="elsewhere/x.parquet")
    assert uploads.dangling_uploads(output, DAY_S) == []
    left = uploads.dangling_uploads(output, -60)
    assert [upload.url for upload in left] == [f"{output}/scores/x.parquet"]
    nothing = {
        "parts": [],
        "parts_looked_at": Counter(),
        "num_spared": 0,
        "num_elsewhere": 0,
        "num_pending": 0,
        "skipped": (),
    }
    garbage.delete(Garbage(uploads=left, **nothing))
    assert uploads.dangling_uploads(output, -60) == []
    assert len(uploads.dangling_uploads(s3_server.url("elsewhere"), -60)) == 1


def test_a_shard_that_cannot_be_read_keeps_its_parts(config: Any, corpus: Path) -> None:
    shard = corpus / "shard-1.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])  # it is being uploaded
    age(config)
    before = parts(config)
    refused = gc(config, "--delete", "--set", "input.on_bad_shard=skip")
    assert refused.exit_code == 2
    assert "1 shard cannot be read" in refused.stderr
    assert parts(config) == before


def test_parts_are_known_by_any_spelling_of_their_url(config: Any) -> None:
    job = plan(check(config, selecting=False))
    assert len(garbage.find([job], []).parts) == 0  # all are young
    age(config)
    spelled = replace(job.plan, scores_url=f"file://{job.plan.scores_url}")
    assert len(garbage.find([replace(job, plan=spelled)], []).parts) == 1


def test_rows_beyond_max_rows_keep_their_parts(config: Any) -> None:
    """It is for a try; the shards are as they were, and all of them have scores."""
    age(config)
    every = found(config)["parts"]
    assert found(config, "--set=input.max_rows=15")["parts"] == every
    deleted = gc(config, "--delete", "--set=input.max_rows=15")
    assert deleted.exit_code == 0, deleted.stderr
    assert len(parts(config)) == 3
    assert run.score(config).summary.units_scored == 0
