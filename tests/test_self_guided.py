"""The whole method on a tiny model: experience, scoring, selection, retraining, comparison."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from conftest import on_a_full_disk, tiny_model, write_parquet

from pipeline import listing, manifests, run, training
from pipeline.cluster import Trainers
from pipeline.config_training import TrainConfig
from pipeline.errors import ConfigError, InputError, ModelError, StorageError, TrainingError
from pipeline.job import check, plan
from pipeline.training import publish_model
from pipeline.training_job import plan_training
from pipeline.training_loop import StepDone
from pipeline.watching import Silence

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ConfigFor = Callable[..., Any]

WORDS = [
    "Paris",
    "poem",
    "capital",
    "numbers",
    "return",
    "wind",
    "sea",
    "France",
    "task",
    "response",
]
TRAIN = {"learning_rate": 1e-3, "batch_rows": 16, "checkpoint_steps": 2}


@pytest.fixture(scope="module")
def rows500(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five hundred Alpaca rows in four shards."""
    folder = tmp_path_factory.mktemp("rows500")
    for shard in range(4):
        rows = [
            {
                "instruction": f"Write line {i} about the {WORDS[i % 10]}.",
                "input": "" if i % 3 else f"tone {i % 7}",
                "output": f"{WORDS[i * 7 % 10]} number {i}: " + "the sea and the wind " * (i % 4),
            }
            for i in range(shard * 125, shard * 125 + 125)
        ]
        write_parquet(folder / f"shard-{shard}.parquet", rows)
    return folder


class Watch:
    """What a run says it does."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.steps: list[StepDone] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def unit(self, *_: Any) -> None:
        pass

    def step(self, step: StepDone) -> None:
        self.steps.append(step)


def test_three_phases_and_a_comparison(
    ray_local: None, config_for: ConfigFor, rows500: Path, tmp_path: Path
) -> None:
    whole = {
        "experience": {"clusters": 20, "per_cluster": 3, "train": TRAIN},
        "train": {**TRAIN, "epochs": 2},
        "select": {"fraction": 0.1, "max_ifd": None},
    }
    config = config_for(rows500, **whole)
    watch = Watch()
    result = run.run(config, watch)
    assert watch.phases == [
        "embedding",
        "training on the experience subset",
        "scoring",
        "training on the cherry subset",
    ]
    summary = result.summary
    assert summary.rows_by_status == {"ok": 500}
    assert summary.selected_rows == 50
    assert [s.num_steps for s in watch.steps] == [4] * 4 + [8] * 8  # 60 rows once, 50 rows twice

    models = {Path(p).name for p in (tmp_path / "out/models").iterdir()}
    assert models == {Path(summary.model or "").name, Path(summary.trained_path or "").name}
    scores = {p.name for p in (tmp_path / "out/scores").iterdir()}
    assert scores == {summary.score_fingerprint}  # nothing was scored by the base model
    manifest = result.trained and result.trained.manifest
    assert manifest is not None
    assert manifest["rows"] == 50
    losses = [step["loss"] for step in manifest["history"]]
    assert losses[-1] < losses[0]

    # A model that comes out goes in as it is.
    again = run.score(config_for(rows500, model={"path": summary.trained_path}))
    assert again.summary.rows_by_status == {"ok": 500}
    assert again.summary.score_fingerprint != summary.score_fingerprint

    before = listing.list_objects(str(tmp_path / "out"))
    idle = Watch()
    rerun = run.run(config, idle).summary
    assert idle.phases == []
    assert (rerun.units_scored, rerun.manifest) == (0, summary.manifest)
    assert (rerun.model, rerun.trained_path) == (summary.model, summary.trained_path)
    assert listing.list_objects(str(tmp_path / "out")) == before
    assert run.select(config).summary.manifest == summary.manifest
    assert run.train(config)[0].url == summary.trained_path

    write_parquet(tmp_path / "held" / "a.parquet", [
        {"instruction": "Write line 2.", "input": "", "output": "poem"},
        {"instruction": "Write line 3.", "input": "", "output": "the sea and the wind"},
    ])  # fmt: skip
    arms = ["cherry", "random_rows", "random_tokens"]
    compared = config_for(rows500, **whole | {"compare": {
        "arms": arms, "seeds": [0, 1], "holdout_rows": 40, "points": 3, "same": "steps",
        "evaluate": [{"name": "short $1", "path": str(tmp_path / "held"), "exact_match": True}],
    }})  # fmt: skip
    found, _ = run.compare(compared)
    assert [arm["arm"] for arm in found.report["arms"]] == arms
    for arm in found.report["arms"]:
        assert len(arm["loss"]["input"]) == len(arm["exact_match"]["short $1"]) == 2
        assert arm["steps"] == found.report["arms"][0]["steps"]
        first, _, last = (step for step, _ in arm["curves"]["input"][0])
        assert (first, last) == (0, arm["steps"][0])
        assert arm["loss"]["input"][0] < found.report["before"]["input"]["loss"]
    assert found.report["before"]["input"].keys() == {"loss"}  # nobody asked for exact matches
    cherry, rows, tokens = found.report["arms"]
    assert rows["rows"] == cherry["rows"]
    assert max(abs(t - cherry["tokens"][0]) for t in tokens["tokens"]) < 100
    assert rows["loss"]["input"][0] != rows["loss"]["input"][1]
    folder = Path(found.url)
    assert sorted(p.name for p in folder.iterdir()) == ["curves.png", "curves.svg", "report.json"]
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(found.report))
    assert len(list((tmp_path / "out/models").iterdir())) == 2  # none of these is kept
    idle = Watch()
    assert run.compare(compared, idle)[0].url == found.url
    assert idle.phases == []
    held = [pq.read_table(path) for path in (tmp_path / "out/comparison/held_out").iterdir()]
    assert sorted(map(len, held)) == [2, 40]


def _train(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "run", *arguments]
    return subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "RAY_ADDRESS": "local"},
        **options,
    )


def history(output: Path, trained_on: str) -> list[dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in output.glob("models/*/_MANIFEST.json")]
    (manifest,) = (m for m in found if m["trained_on"] == trained_on)
    steps: list[dict[str, Any]] = manifest["history"]
    return steps


@pytest.mark.timeout(1500)  # five runs, one after the other
def test_a_killed_training_ends_with_the_same_curve(
    corpus: Path, tmp_path: Path, model_dir: Path
) -> None:
    """The driver and all it started die in the middle; the rerun goes on from a checkpoint."""
    config = {
        "input": {"path": str(corpus)},
        "model": {"path": str(model_dir), "dtype": "float32"},
        "select": {"count": 40, "max_ifd": None},
        "train": {**TRAIN, "epochs": 60, "batch_rows": 8, "dtype": "float32"},
        "cluster": {"threads_per_actor": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    outputs = {name: tmp_path / name for name in ("undisturbed", "killed")}
    assert _train([str(path), "--set", f"output={outputs['undisturbed']}"]).wait(280) == 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before = set(outputs["killed"].glob("training/*/checkpoints/step-*.pt"))
        killed = _train([str(path), "--set", f"output={outputs['killed']}"])
        deadline = time.monotonic() + 200
        while not set(outputs["killed"].glob("training/*/checkpoints/step-*.pt")) - before:
            assert killed.poll() is None, killed.stderr and killed.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)  # poll interval; the condition is the checkpoint
        if number == signal.SIGKILL:
            os.killpg(killed.pid, number)
        else:
            killed.send_signal(number)
        said = killed.communicate(timeout=60)[1].decode()
        assert killed.returncode == code, said
        assert ("cherry: interrupted; what was done is kept" in said) == (code > 0)
        assert "Traceback" not in said
    assert not list(outputs["killed"].glob("models/*/_MANIFEST.json"))
    resumed = _train([str(path), "--set", f"output={outputs['killed']}"])
    assert resumed.wait(200) == 0
    curves = [history(output, "the cherry subset") for output in outputs.values()]
    assert len(curves[0]) == 300
    assert curves[0] == curves[1]
    assert not list(outputs["killed"].glob("training/*/checkpoints/*"))


def test_a_lost_worker_is_made_again(ray_local: None, config_for: ConfigFor, rows500: Path) -> None:
    """A training process dies after a checkpoint; the run goes on from there by itself."""

    class Killer(Watch):
        def step(self, step: StepDone) -> None:
            super().step(step)
            if len(self.steps) == 5:
                (worker,) = (
                    process
                    for process in psutil.Process().children(recursive=True)
                    if "RayTrainWorker" in " ".join(process.cmdline())
                )
                worker.kill()

    train = {**TRAIN, "epochs": 20, "batch_rows": 8, "dtype": "float32"}
    select = {"count": 40, "max_ifd": None}
    config = config_for(rows500, train=train, select=select)
    watch = Killer()
    trained = run.run(config, watch).trained
    assert trained is not None
    assert [step["step"] for step in trained.manifest["history"]] == list(range(1, 101))
    steps = [step.step for step in watch.steps]
    assert len(steps) > 100  # some were done twice,
    assert steps.count(1) == 1  # and not all of them


def test_workers_that_never_come_are_not_waited_for(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a spot machine was taken away and none is left: the others cost money."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    monkeypatch.setattr(training, "_MOST_STARTS", 1)
    absent = Trainers(workers=50, use_gpu=False, resources={"CPU": 1}, threads=1)
    job: Any = SimpleNamespace(url=str(tmp_path / "models/none"))
    with pytest.raises(TrainingError, match=r"did not come in 1 minutes \(wanted: 50 workers"):
        training._fit([job], absent, Silence())


def test_bad_input_is_refused_before_anything_is_trained(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="key 'train': it is missing"):
        run.train(config_for(corpus))
    with pytest.raises(InputError, match=r"units are not scored yet"):
        run.train(config_for(corpus, train={}))
    with pytest.raises(InputError, match=r"not trained yet under .* Run: cherry run CONFIG"):
        run.select(config_for(corpus, experience={"clusters": 2}))
    none = config_for(corpus, train={}, select={"count": 0})
    with pytest.raises(InputError, match="the subset has no rows"):
        run.run(none)
    bare = tmp_path / "bare"
    tiny_model("Llama").save_pretrained(bare)
    with pytest.raises(ModelError, match="it has no tokenizer"):
        run.run(config_for(corpus, train={}, model={"path": str(bare)}))
    with pytest.raises(ConfigError, match=r"train\.workers 9: the cluster has 1 node "):
        run.run(config_for(corpus, train={"workers": 9}))
    with pytest.raises(ConfigError, match=r"gpus_per_replica 2: got 1 workers"):
        run.run(config_for(corpus, train={"gpus_per_replica": 2}))
    for section in ("train", "experience"):
        lora = {"lora": {"targets": ["nowhere"]}}
        sections = {section: lora if section == "train" else {"clusters": 2, "train": lora}}
        with pytest.raises(ConfigError, match=r"train\.lora\.targets: .*nowhere"):
            run.run(config_for(corpus, **sections))
    assert not (tmp_path / "out/models").exists()


def test_a_subset_of_one_row_trains(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    config = config_for(
        corpus,
        output=str(tmp_path / "runs[1]*"),  # no glob
        train={**TRAIN, "epochs": 2},
        select={"count": 1, "format": "jsonl"},
    )
    trained = run.run(config).trained
    assert trained is not None
    assert (trained.manifest["rows"], len(trained.manifest["history"])) == (1, 2)


def test_a_loss_that_is_not_finite_is_said(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    config = config_for(corpus, train={**TRAIN, "learning_rate": 1e30}, select={"max_ifd": None})
    with pytest.raises(TrainingError, match="expected finite numbers"):
        run.run(config)
    assert not list((tmp_path / "out").glob("models/*/_MANIFEST.json"))


def test_a_model_that_finds_no_room_is_no_model(
    ray_local: None, config_for: ConfigFor, corpus: Path, tmp_path: Path
) -> None:
    job = plan(check(config_for(corpus), selecting=False))
    planned = plan_training(job, "rows", "digest", TrainConfig())
    with pytest.raises(StorageError, match=r"the trained model cannot be written: .* Free"):
        on_a_full_disk(publish_model, planned, {}, [])
    assert not (tmp_path / "out/models").exists()
    publish_model(planned, {}, [])
    assert manifests.find(planned.url) is not None
