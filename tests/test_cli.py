"""The command line: exit codes, messages, and what goes to which stream."""

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults_cluster as faults
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from click.testing import Result
from conftest import REPOSITORY, ROWS, S3, read_parts, write_parquet
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from pipeline import __version__, cluster, cpu_kernels, report, terminal, texts
from pipeline.cli import app
from pipeline.layouts import Columns
from pipeline.terminal import speaking
from pipeline.units import Plan, Unit

SUMMARY_KEYS = {
    "rows", "rows_by_status", "units_total", "units_scored", "units_reused", "rows_reused",
    "tokens_scored", "tokens_per_s", "seconds", "selected_rows", "cut", "score_fingerprint",
    "scores_path", "cherry_path", "manifest",
}  # fmt: skip
"""The ones that design.md promises; there may be more."""


@pytest.fixture
def job(tmp_path: Path, corpus: Path, model_dir: Path) -> Path:
    """A config file as a user would write it, over forty sound rows."""
    path = tmp_path / "job.yaml"
    config = {
        "input": {"path": str(corpus)},
        "output": str(tmp_path / "out"),
        "model": {"path": str(model_dir), "dtype": "float32"},
        "select": {"fraction": 0.25},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def cherry(*arguments: Any) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def cherry_process(
    *arguments: Any, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, apart from any Ray of the tests."""
    settings = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | (environment or {})
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture
def refused(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a config with overrides that must be refused; returns the message.

    Models load and rows are scored only inside `cluster.connected`, which here is a tripwire.
    """

    def tripwire() -> None:
        raise AssertionError("Ray was started for a config that cannot work")

    monkeypatch.setattr(cluster, "connected", tripwire)

    def run(*overrides: str, command: str = "run") -> str:
        done = cherry(command, job, *(f"--set={override}" for override in overrides))
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == 2
        assert done.stdout == ""
        assert done.stderr.startswith("cherry: ")
        assert not (tmp_path / "out/scores").exists()
        return done.stderr

    return run


def assert_says(message: str, *parts: Any) -> None:
    """Every part is in the message: what, where, got, expected, fix."""
    missing = [str(part) for part in parts if str(part) not in message]
    assert not missing, message


def is_harmless(text: str) -> bool:
    """No control, format or surrogate character but the line feed."""
    return all(c == "\n" or unicodedata.category(c)[0] != "C" for c in text)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["gc", "--help"], ["--version"], ["run", "absent.yaml"]]
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pipeline.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit:\n"
        "    print(sorted({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_a_config_that_is_not_there(refused: Callable[..., str], job: Path) -> None:
    job.unlink()
    assert_says(refused(), f"config {job}: there is no such file.")


def test_a_missing_path(refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused(f"input.path={tmp_path}/absent")
    assert_says(said, f"input {tmp_path}/absent: ", "no such file", "Check the spelling")


def test_a_long_path_is_not_folded(refused: Callable[..., str], tmp_path: Path) -> None:
    path = f"{tmp_path}/{'long-name-' * 20}"
    assert_says(refused(f"input.path={path}"), path)


def test_an_empty_directory(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = refused(f"input.path={tmp_path}/empty")
    assert_says(said, f"input {tmp_path}/empty: nothing is there", "an empty directory")


def test_no_parquet_inside(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/notes.txt").write_text("text")
    said = refused(f"input.path={tmp_path}/docs")
    assert_says(said, f"input {tmp_path}/docs: no Parquet inside", "has 1 other file (notes.txt)")
    assert_says(said, "Expected .parquet, .json or .jsonl")


def test_an_unreadable_parquet(refused: Callable[..., str], corpus: Path) -> None:
    path = corpus / "shard-1.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    said = refused()
    assert_says(said, f"{path}: not a readable Parquet file", "Replace it", "on_bad_shard: skip")


def test_a_missing_column(refused: Callable[..., str], corpus: Path) -> None:
    path = write_parquet(corpus / "shard-9.parquet", [{"instruction": "a", "answer": "b"}])
    said = refused("input.layout=alpaca")
    assert_says(said, f"shard {path}: column 'output' is missing", "(has: instruction, answer)")
    assert_says(said, "Map it: input.columns.response=NAME")
    said = refused()
    assert_says(said, f"shard {path}: no known layout fits", "known: ", "output or response")
    assert_says(said, "has: instruction, answer", "--set input.columns.response=answer")


def test_a_mapped_column_that_is_missing(refused: Callable[..., str]) -> None:
    said = refused("input.layout=alpaca", "input.columns.response=reply")
    assert_says(said, "column 'reply' is missing (has: instruction, input, output)")


def test_a_needed_column_that_is_left_out(refused: Callable[..., str]) -> None:
    said = refused("input.columns.response=null")
    assert_says(said, "key 'input.columns': null for response leaves out a column", "Name the")


@pytest.mark.parametrize("skip", ["skip", "fail"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("output", ["file/out", "/proc/absent"])  # which cannot be listed, or can
def test_an_output_that_cannot_be_written(
    refused: Callable[..., str], corpus: Path, tmp_path: Path, kind: str, skip: str, output: str
) -> None:
    """Whatever of it is written first."""
    (tmp_path / "file").write_text("no directory")
    if kind == "jsonl":
        (corpus / "late.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    said = refused(f"output={tmp_path / output}", f"input.on_bad_shard={skip}")
    assert_says(said, "output: ", tmp_path / output, "Check the path, the credentials")


def test_a_wrong_column_type(refused: Callable[..., str], corpus: Path) -> None:
    path = write_parquet(corpus / "shard-9.parquet", [{"instruction": "a", "output": 7}])
    said = refused()
    assert_says(said, f"shard {path}: column 'output' has type int64, expected a string")
    assert_says(said, "Convert it, or map another: input.columns.response=NAME")


def test_columns_that_do_not_go_together(refused: Callable[..., str], corpus: Path) -> None:
    row = {"instruction": "a", "output": "b", "source": "web"}
    text = write_parquet(corpus / "shard-8.parquet", [row])
    number = write_parquet(corpus / "shard-9.parquet", [{**row, "source": [1]}])
    said = refused()
    assert_says(said, "column 'source': string in shard", text, number, "Convert one of them")


def test_a_reserved_column_name(refused: Callable[..., str], corpus: Path) -> None:
    row = {"instruction": "a", "output": "b", "rank": 1}
    path = write_parquet(corpus / "shard-9.parquet", [row])
    said = refused()
    assert_says(said, f"shard {path}: column 'rank' has a name that the output needs")
    assert_says(said, "(sample_id, ifd_loss_ratio, ifd_ppl_ratio, rank)", "Rename it")


def test_an_unknown_config_key(refused: Callable[..., str], job: Path) -> None:
    said = refused("score.max_lenght=256")
    assert_says(said, f"config {job} with --set: key 'score.max_lenght' is unknown")
    assert_says(said, "Did you mean 'score.max_length'?")


def test_a_section_that_is_there_twice(refused: Callable[..., str], job: Path) -> None:
    """YAML takes the last, and what the first says would not be done."""
    job.write_text(job.read_text() + "select: {count: 5}\n")
    assert_says(refused(), f"config {job}: cannot be read as YAML", "'select' is there twice")


def test_yaml_that_merges_and_refers_to_itself(refused: Callable[..., str], job: Path) -> None:
    job.write_text("x: {y: &a {<<: {path: /a}, path: /c}}\nz: {<<: *a}\nr: &r [*r]\n")
    assert_says(refused(), "key 'x' is unknown")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("input=3", "key 'input': got 3, expected a section of keys"),
        ("input.path=", "key 'input.path': got None, expected text, or a list"),
        ("cluster.actors=0", "key 'cluster.actors': got 0, expected 'auto', or more than 0"),
        ("select.fraction=10%", "key 'select.fraction': got '10%', expected a number"),
        (
            "score.compile=perhaps",
            "key 'score.compile': got 'perhaps', expected 'auto', or true or false",
        ),
        ("select.count=-1", "key 'select.count': got -1, expected at least 0"),
        ("input.path=[1, 2]", "key 'input.path': got 1, expected text"),
        ("input.path=[]", "key 'input.path': got [], expected text, or a list that is not empty"),
        ("cluster.actors=aut", "expected 'auto', or a whole number. Did you mean 'auto'?"),
        ("cluster.gpus_per_actor=.inf", "got inf, expected 'auto', or a finite number"),
        ("score.share=prefixes", "key 'score.share': got 'prefixes', expected a list"),
        ("output=", "key 'output': got None, expected text"),
        ("output=''", "key 'output': got '', expected text that is not empty"),
    ],
)
def test_a_value_of_another_type(refused: Callable[..., str], override: str, said: str) -> None:
    message = refused(override)
    assert_says(message, " with --set: ", f"{said}\n")
    assert message.count("expected") == 1


def test_an_unknown_preset(refused: Callable[..., str]) -> None:
    said = refused("score.preset=superfilter")
    assert_says(said, "key 'score.preset': got 'superfilter'", "expected 'cherry', ")
    assert_says(said, "Did you mean 'superfiltering'?")


def test_a_fraction_outside_0_to_1(refused: Callable[..., str]) -> None:
    said = refused("select.fraction=10")
    assert_says(said, "key 'select.fraction': got 10; expected a fraction from 0 to 1", "0.10 is")


def test_two_budgets(refused: Callable[..., str]) -> None:
    said = refused("select.count=10")  # the file sets a fraction
    assert_says(said, "key 'select': set one of fraction and count, and leave the others out")


def test_a_model_path_that_does_not_exist(refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused(f"model.path={tmp_path}/llama")
    assert_says(said, f"model.path {tmp_path}/llama: there is no such directory", "Expected a ")
    assert_says(refused("model.path=./m.gguf"), "model.path ./m.gguf: there is no such file")


def test_a_hub_id_that_cannot_be_had(refused: Callable[..., str]) -> None:
    said = refused("model.path=nobody/no-such-model", "model.revision=v1")
    assert_says(said, "model.path nobody/no-such-model: there is no such directory here")
    assert_says(said, "the hub does not give a model of this name (revision v1)")


def test_a_tokenizer_that_is_missing(
    refused: Callable[..., str], tmp_path: Path, model_dir: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    said = refused(f"model.path={folder}")
    assert_says(said, f"model.path {folder}: it has no tokenizer (has: ", "config.json")
    assert_says(said, "Put its tokenizer.json and tokenizer_config.json beside the weights")


def test_weights_that_are_not_safetensors(
    refused: Callable[..., str], tmp_path: Path, model_dir: Path
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(b"")
    said = refused(f"model.path={folder}")
    assert_says(said, f"model.path {folder}: expected config.json and *.safetensors")
    assert_says(said, "pytorch_model.bin", "Convert other weights with save_pretrained()")


def test_another_model_than_the_one_pinned(refused: Callable[..., str], model_dir: Path) -> None:
    said = refused("model.revision=sha256:0000")
    assert_says(said, f"model.path {model_dir}: got sha256:", "expected model.revision sha256:0000")


def test_max_length_over_the_positions_of_the_model(
    refused: Callable[..., str], model_dir: Path
) -> None:
    said = refused("score.max_length=2049")
    assert_says(said, "key 'score.max_length': got 2049, expected at most 2048", model_dir)


def test_an_output_inside_the_input(refused: Callable[..., str], corpus: Path) -> None:
    said = refused(f"output={corpus}/scored")
    assert_says(said, f"output {corpus}/scored: it lies inside the input {corpus}")
    assert_says(said, "Choose an output beside the input")


def test_credentials_in_a_url(refused: Callable[..., str]) -> None:
    said = refused("output=s3://AKIA123:hunter2@bucket/out")
    assert_says(said, "a URL carries credentials", "in the environment (AWS_ACCESS_KEY_ID")
    assert "AKIA123" not in said
    assert "hunter2" not in said


@pytest.mark.parametrize("command", ["run", "score", "select"])
def test_every_command_refuses_alike(refused: Callable[..., str], command: str) -> None:
    assert_says(refused("input.path=/absent", command=command), "input /absent: there is no such")


def test_a_hostile_column_name_is_shown_harmlessly(
    refused: Callable[..., str], corpus: Path
) -> None:
    write_parquet(corpus / "shard-9.parquet", [{"[/b]\x1b]0;owned\x07\u202e": "a"}])
    said = refused()
    assert_says(said, "has: [/b]\ufffd]0;owned\ufffd\ufffd; known")
    assert is_harmless(said)


def test_hostile_text_is_cut_to_one_plain_line() -> None:
    assert texts.plain("[/b] a\n\tb\x1b[31m\u202ec\x00\u2028d\r") == "[/b] a b [31m c d"
    assert texts.plain("x" * 500, limit=160) == "x" * 159 + "…"
    assert texts.plain("\x00" * 10**7) == ""


def test_a_missing_path_ends_a_real_process_before_ray_starts(job: Path, tmp_path: Path) -> None:
    done = cherry_process(
        "run", job, "--set", "input.path=/absent", "--json",
        environment={"RAY_TMPDIR": str(tmp_path / "ray")},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "cherry: input /absent: there is no such file, directory or bucket. Check the spelling.\n"
    )
    assert not (tmp_path / "ray").exists()


@pytest.mark.s3
def test_a_store_that_denies_permission_ends_a_real_process(job: Path, s3_server: S3) -> None:
    url = s3_server.url("denied-corpus")
    s3_server.filesystem().pipe_file(f"{url}/a.parquet", b"PAR1")
    done = cherry_process(
        "run", job, "--set", f"input.path={url}",
        environment={"AWS_SECRET_ACCESS_KEY": "wrong-hunter2"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert_says(done.stderr, f"cherry: input {url}: permission denied", "check the key")
    assert "Traceback" not in done.stderr
    assert "wrong-hunter2" not in done.stderr


@pytest.mark.ray
def test_json_prints_one_object_and_nothing_else_on_standard_output(job: Path) -> None:
    done = cherry_process("run", job, "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert done.stdout.endswith("\n")
    summary = json.loads(line)
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["rows"] == sum(summary["rows_by_status"].values()) == len(ROWS)
    assert summary["units_scored"] == summary["units_total"] == 3
    assert summary["tokens_scored"] > 0
    manifest = json.loads(Path(summary["manifest"]).read_text())
    assert manifest["selected_rows"] == summary["selected_rows"] > 0
    assert len(read_parts(summary["scores_path"])) == len(ROWS)
    parts = sorted(Path(summary["cherry_path"]).glob("*.parquet"))
    assert sum(pq.read_metadata(part).num_rows for part in parts) == summary["selected_rows"]
    assert_says(done.stderr, "Rows", "all", summary["cherry_path"])
    assert "Traceback" not in done.stderr
    assert is_harmless(done.stderr)


def test_a_terminal_that_lacks_letters_shows_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work is done by then: its exit code is no matter of fonts."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1", write_through=True))
    with speaking(as_json=False) as terminal:
        terminal.results.print(Text("é and 水"))
    assert shown.getvalue() == b"\xe9 and \\u6c34\n"


@pytest.mark.ray
def test_without_json_the_report_is_on_standard_output(job: Path, ray_local: None) -> None:
    done = cherry("run", job)
    assert done.exit_code == 0, done.stderr
    assert_says(
        done.stdout, "Rows", "rows kept: 0.25 of all 40 rows", f"manifest {job.parent}/out/cherry/"
    )
    assert "manifest" not in done.stderr


@pytest.mark.ray
def test_selecting_before_scoring_says_what_to_run(job: Path, ray_local: None) -> None:
    done = cherry("select", job)
    assert (done.exit_code, done.stdout) == (2, "")
    assert_says(
        done.stderr, "3 of 3 units are not scored yet, in float32",
        "Run: cherry score CONFIG", "set model.dtype",
    )  # fmt: skip


@pytest.mark.ray
def test_exit_3_above_the_error_tolerance_keeps_the_scores(
    job: Path, tmp_path: Path, ray_local: None
) -> None:
    source = tmp_path / "in/rows.jsonl"
    source.parent.mkdir()
    source.write_text("\n".join([*map(json.dumps, ROWS[:8]), "{oops", "[]"]))
    first = cherry("run", job, f"--set=input.path={source}", "--json")
    assert first.exit_code == 3
    summary = json.loads(first.stdout)
    assert summary["rows_by_status"]["malformed"] == 2
    assert sum(summary["rows_by_status"].values()) == 10
    assert_says(first.stderr, "20.00 % of the rows failed or are malformed")
    where = f"{source}#0, row"
    assert summary["failures"] == [
        f"shard {where} 8: malformed: bad_line: line 9: Expecting property name enclosed in double "
        "quotes: character 2",
        f"shard {where} 9: malformed: bad_line: line 10: got list, expected an object",
    ]
    assert_says(first.stderr, f"failed: {summary['failures'][0]}")
    assert "more that failed" not in first.stderr
    assert_says(first.stderr, "score.max_error_fraction (1 %)", summary["scores_path"])
    kept = read_parts(summary["scores_path"])
    assert kept["status"].to_pylist().count("malformed") == 2
    assert kept["reason"].to_pylist()[8].startswith("bad_line: line 9: ")
    assert summary["selected_rows"] == 2
    again = cherry(
        "run", job, f"--set=input.path={source}", "--set=score.max_error_fraction=0.2", "--json"
    )
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["units_scored"] == 0
    assert read_parts(summary["scores_path"]).equals(kept)
    source.write_text("\n".join([*map(json.dumps, ROWS[:8]), *["[]"] * 7]))
    many = cherry("score", job, f"--set=input.path={source}")
    assert_says(many.stdout, "and 2 more that failed; the parts say why")


@pytest.mark.ray
def test_exit_3_when_a_shard_was_skipped(job: Path, corpus: Path, ray_local: None) -> None:
    (corpus / "bad\x1b[31m[b].parquet").write_bytes(b"garbage")
    done = cherry("run", job, "--set=input.on_bad_shard=skip", "--json")
    assert done.exit_code == 3, done.stderr
    summary = json.loads(done.stdout)
    assert summary["rows"] == len(ROWS)
    assert [str(corpus) in reason for reason in summary["skipped_shards"]] == [True]
    assert_says(done.stderr, f"skipped: {corpus}/bad\ufffd[31m[b].parquet: not a readable")
    assert is_harmless(done.stderr)
    # Whoever finds the subset later sees it too, and so does who trains on it.
    assert json.loads(Path(summary["manifest"]).read_text())["skipped_shards"] == 1
    trained = cherry("train", job, "--set=input.on_bad_shard=skip", "--set=train={}", "--json")
    assert trained.exit_code == 3, trained.stderr
    assert json.loads(trained.stdout)["skipped_shards"] == summary["skipped_shards"]


@pytest.mark.ray
@pytest.mark.skipif(not cpu_kernels.can_run(), reason="needs a CPU with AVX-512 and a C compiler")
def test_what_scoring_processes_warn_of_is_said_once(job: Path) -> None:
    here = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "score", job, "--set=score.unit_rows=1"],
        cwd=REPOSITORY, env=here | {"CC": "no-such-compiler"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert said.count("kernels for this CPU cannot be compiled") == 1, done.stderr
    assert "no-such-compiler" in said


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_run_that_is_ended_says_so_and_goes_on_later(
    job: Path, number: signal.Signals, code: int
) -> None:
    scores = yaml.safe_load(job.read_text())["output"] + "/scores"
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", job, "--set=score.unit_rows=1", "--json"],
        cwd=REPOSITORY, env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    faults.wait_until(lambda: list(Path(scores).glob("*/*.parquet")), "a part")
    process.send_signal(number)
    out, said = process.communicate(timeout=120)
    assert (process.returncode, out) == (code, ""), said
    *_, last = said.splitlines()
    assert last == (
        "cherry: interrupted; what was done is kept, and the same command goes on from there"
    )
    for noise in ("SIGTERM", "Traceback", "Started a local Ray"):
        assert noise not in said
    again = cherry("run", job, "--set=score.unit_rows=1", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["units_reused"] > 0


HOSTILE = [
    {"instruction": "[/b] [red]loud[/red] [link=x]here[/link]", "output": "[/] [bold]text"},
    {"instruction": "\x1b[31mred\x1b[0m \x1b]0;title\x07", "output": "a\x00b\x08c\x7fd\x9be"},
    {"instruction": "abc\u202efed\u2066ghi\u2069", "output": "zero\u200bwidth\ufeff mark"},
    {"instruction": "{{ 7 * 7 }} {% raw %} {instruction}", "output": "<script>alert(1)</script>"},
    {"instruction": "over\rwrite\u2028line\u2029end", "output": "\U000e0041tag \ue000 private"},
]


@pytest.mark.ray
def test_hostile_text_is_scored_kept_and_shown_harmlessly(
    job: Path, tmp_path: Path, ray_local: None
) -> None:
    path = write_parquet(tmp_path / "hostile/a.parquet", HOSTILE)
    options = ("input.path=" + str(path), "select.max_ifd=null", "select.fraction=1")
    done = cherry("run", job, *(f"--set={option}" for option in options))
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert is_harmless(done.stdout + done.stderr)
    shown = ["[/b] [red]loud[/red] [link=x]here[/link]", "[/] [bold]text", "[31mred [0m ]0;title"]
    shown += ["a b c d e", "abc fed ghi", "zero width mark", "{{ 7 * 7 }} {% raw %} {instruction}"]
    shown += ["<script>alert(1)</script>", "over write line end", "tag private"]
    assert_says(done.stdout, *shown)
    (part,) = (tmp_path / "out/cherry").glob("*/part-00000.parquet")
    kept = pq.read_table(part, columns=["instruction", "output"]).to_pylist()
    by_instruction = [sorted(rows, key=lambda r: r["instruction"]) for rows in (kept, HOSTILE)]
    assert by_instruction[0] == by_instruction[1]


def test_the_commands_and_their_options_are_pinned() -> None:
    group: Any = typer.main.get_command(app)
    found = {
        name: [option for p in command.params for option in (p.opts if p.opts else [p.name])]
        for name, command in group.commands.items()
    }
    common = ["path", "--set", "--json"]
    scoring = [*common, "--retry-errors"]
    gc = [*common, "--delete", "--all", "--force"]
    assert found == {
        "run": scoring,
        "score": scoring,
        "select": common,
        "experience": scoring,
        "train": common,
        "compare": common,
        "gc": gc,
        "plan": [*common, "--score"],
        "submit": [*scoring, "--address", "--command", "--wait", "--env", "--extra", "--installed"],
    }


def test_every_command_is_described() -> None:
    said = cherry("--help")
    assert said.exit_code == 0
    for name in ("run", "score", "select", "experience", "train", "compare", "plan", "gc"):
        assert f"\n  {name} " in said.stdout
        help_text = cherry(name, "--help").stdout
        assert_says(
            help_text, f"cherry {name} [OPTIONS]", "CONFIG", "--set", "repeatable", "--json"
        )


@pytest.mark.parametrize("name", ["experience", "train", "compare"])
def test_a_phase_without_its_section_is_refused(tmp_path: Path, name: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("input: {path: in}\noutput: out\nmodel: {path: m}\n")
    done = cherry(name, str(config))
    assert done.exit_code == 2
    assert_says(done.stderr, f"key '{name}': it is missing.", f"`{name}: {{}}` takes the defaults")


def test_short_help() -> None:
    done = cherry("plan", "-h")
    assert done.exit_code == 0
    assert done.stdout == cherry("plan", "--help").stdout


def test_help_fits_a_terminal_of_80_columns() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout
    assert "..." not in text.partition("Commands:")[2]
    assert max(map(len, text.splitlines())) <= 80


def test_version() -> None:
    assert cherry("--version").stdout == f"cherry {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["run"], ["runn", "x"], ["run", "x", "--nope"]])
def test_a_wrong_command_line_exits_2(arguments: list[str]) -> None:
    assert cherry(*arguments).exit_code == 2


def test_what_a_library_logs_is_text_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a-key-of-a-store")
    monkeypatch.setenv("SORT_KEY_COLUMN", "row \x1b[31m")  # no secret: what it says stays
    monkeypatch.setenv("OS_AUTH_TYPE", "a-key-of")
    quoted = "row \x1b[31mred\x1b[0m under a-key-of-a-store"
    record = logging.LogRecord("ray.data", logging.ERROR, "", 0, quoted, None, None)
    said = terminal._Formatter("%(message)s").format(record)
    assert said == "row \ufffd[31mred\ufffd[0m under $AZURE_STORAGE_KEY"


def test_a_row_that_cannot_be_shown_any_more_is_no_failure(tmp_path: Path) -> None:
    """Everything is written by then."""
    url = f"{tmp_path}/gone.parquet"
    columns = Columns("prompt_completion", {"prompt": "prompt", "response": "completion"})
    unit = Unit("u", url, url, columns, 0, 1, "fp", "fp", 1, "v")
    table = report._samples(Plan((unit,), "scores", {url: 1}), [(0.5, 0, 0)], "title")
    console = Console(width=300)
    with console.capture() as capture:
        console.print(table)
    assert "0.5000" in capture.get()
    assert "gone.parquet" in capture.get()
