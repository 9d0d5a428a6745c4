"""Models: what is found, what identifies it, and a cache that two processes share."""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_tokenizer, on_a_full_disk, tiny_model
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from pipeline import model_files, models
from pipeline.config import ModelConfig
from pipeline.engine import Engine, TokenSequence
from pipeline.errors import ModelError
from pipeline.model_cache import make_once


def resolve(path: Path, cache: Path, **options: str) -> model_files.ModelRef:
    return model_files.resolve(ModelConfig(path=str(path), cache_dir=str(cache), **options))


def test_a_directory_is_identified_by_its_weights_content(model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    first = resolve(model_dir, tmp_path).fingerprint
    assert resolve(copy, tmp_path).fingerprint == first
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert resolve(copy, tmp_path).fingerprint != first
    with pytest.raises(ModelError, match=f"expected model.revision {first}"):
        resolve(copy, tmp_path, revision=first)


def test_a_changed_config_is_another_model(model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    before = resolve(copy, tmp_path).fingerprint
    config = copy / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert resolve(copy, tmp_path).fingerprint != before


_RESOLVE = """
import sys
from pipeline.config import ModelConfig
from pipeline.model_files import resolve
for revision in (None, sys.argv[1]):
    print(resolve(ModelConfig(path="org/tiny", revision=revision)).fingerprint)
"""


def test_a_hub_model_is_identified_by_its_resolved_revision(
    model_dir: Path, tmp_path: Path
) -> None:
    """`main` and the commit that it points to are one model; when it moves, another."""
    repository = tmp_path / "models--org--tiny"
    old, new = "a" * 40, "b" * 40
    (repository / "refs").mkdir(parents=True)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    said = []
    for commit in (old, new):
        shutil.copytree(model_dir, repository / "snapshots" / commit)
        (repository / "refs/main").write_text(commit)
        command = [sys.executable, "-c", _RESOLVE, old]
        done = subprocess.run(
            command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        said.append(done.stdout.split())
    assert said == [[f"commit:{old}"] * 2, [f"commit:{new}", f"commit:{old}"]]


def test_what_lies_below_a_models_url_is_another_model(
    model_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fs = fsspec.filesystem("memory")
    request.addfinalizer(lambda: fs.rm("/models", recursive=True))
    fs.put(f"{model_dir}/", "/models/right/", recursive=True)
    whole = model_files.resolve(ModelConfig(path="memory://models/right", cache_dir=str(tmp_path)))
    for name in ("config.json", "model.safetensors"):
        fs.pipe_file(f"/models/right/step_500/{name}", b"{}")
    ref = model_files.resolve(ModelConfig(path="memory://models/right", cache_dir=str(tmp_path)))
    assert ref.fingerprint == whole.fingerprint
    found = Path(model_files.local_directory(ref), "model.safetensors")
    assert found.read_bytes() == (model_dir / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["absent", "a file"])
def test_a_cache_that_cannot_be_written_is_named_or_done_without(
    kind: str, model_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cache = Path("/proc/absent") if kind == "absent" else tmp_path / "file"
    if kind == "a file":
        cache.touch()
    expected = resolve(model_dir, tmp_path / "good").fingerprint
    assert resolve(model_dir, cache).fingerprint == expected  # only remembered there
    fs = fsspec.filesystem("memory")
    request.addfinalizer(lambda: fs.rm("/models", recursive=True))
    fs.put(f"{model_dir}/", "/models/m/", recursive=True)
    ref = model_files.resolve(ModelConfig(path="memory://models/m", cache_dir=str(cache)))
    with pytest.raises(
        ModelError, match=rf"model\.cache_dir: it cannot be written on node .*{cache}"
    ):
        model_files.local_directory(ref)


def _fetch(ref: model_files.ModelRef) -> None:
    model_files.local_directory(ref)


def _convert(ref: model_files.ModelRef) -> None:
    """As of a .gguf, whose weights are written by another library."""

    def make(into: str) -> None:
        save_file({"weight": torch.zeros(100_000)}, Path(into, "model.safetensors"))

    make_once(ref.cache_dir, "converted", make)


@pytest.mark.parametrize("step", [_fetch, _convert])
def test_a_full_cache_is_named_and_left_as_it_was(
    step: Callable[..., None], model_dir: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    config = ModelConfig(path=f"file://{model_dir}", cache_dir=str(cache))
    ref = model_files.resolve(config)
    with pytest.raises(ModelError, match=r"model\.cache_dir: it cannot be written on node .*large"):
        on_a_full_disk(step, ref)
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock" and path.is_file()]


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_node_without_the_model_is_named(kind: Any, tmp_path: Path) -> None:
    ref = model_files.ModelRef(str(tmp_path / "absent"), kind, "sha256:00", str(tmp_path))
    with pytest.raises(ModelError, match=rf"it is not on node {platform.node()}"):
        model_files.local_directory(ref, weights=False)


def test_a_node_with_another_gguf_is_refused(tmp_path: Path) -> None:
    """Its scores would go under the fingerprint of the right one."""
    other = tmp_path / "model.gguf"
    other.write_bytes(b"another model")
    ref = model_files.ModelRef(str(other), "gguf", "sha256:" + "1" * 64, str(tmp_path))
    with pytest.raises(ModelError, match=r"got sha256:.* on node .*expected sha256:1111"):
        model_files.local_directory(ref)


def test_a_gated_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = SimpleNamespace(status_code=403, headers={}, request=None)
    said = "403 Client Error. (Request ID: 1)\n\nCannot access gated repo"

    def gated(*_: object, **__: object) -> None:
        raise GatedRepoError(said, response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(ModelError, match=r"Cannot access gated repo.* set HF_TOKEN"):
        model_files.resolve(ModelConfig(path="org/gated"))


def test_missing_weights_are_refused_not_made_up(model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    ref = resolve(copy, tmp_path)
    with pytest.raises(ModelError, match=r"weights lack model\.layers\.1\.mlp\.up_proj"):
        models.load(ref, torch.float32, torch.device("cpu"))


def test_a_config_that_asks_for_tuples_gives_the_same_losses(
    model_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    found = []
    for path in (model_dir, copy):
        loaded = models.load(resolve(path, tmp_path), torch.float32, torch.device("cpu"))
        sequence = TokenSequence(np.arange(20, dtype=np.int32), ((1, 20),))
        found += Engine(loaded).score([sequence])
    assert found[0] == found[1]
    assert found[0].error is None


def test_a_model_that_its_gpus_cannot_hold_is_refused(model_dir: Path, tmp_path: Path) -> None:
    ref = resolve(model_dir, tmp_path)
    with pytest.raises(ModelError, match=r"does not fit 2 GPUs, part of it went to the cpu"):
        models.load(ref, torch.float32, torch.device("cuda"), num_devices=2)


def test_a_directory_without_a_tokenizer_is_refused(model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        models.load_tokenizer(resolve(copy, tmp_path))


def test_parameters_are_counted_without_weights(model_dir: Path, tmp_path: Path) -> None:
    model = tiny_model("Llama", max_position_embeddings=2048)
    config = models.load_config(resolve(model_dir, tmp_path))
    assert sum(p.numel() for p in models.outline(config).parameters()) == sum(
        p.numel() for p in model.parameters()
    )


def _make_slowly(cache: str, log: str, barrier: Any) -> None:
    def make(into: str) -> None:
        with open(log, "a") as handle:
            handle.write(f"{os.getpid()}\n")
        Path(into, "file").write_text("content")

    barrier.wait()
    make_once(cache, "thing", make)


def test_two_processes_make_a_cached_model_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    log = tmp_path / "log"
    arguments = (str(tmp_path), str(log), barrier)
    workers = [context.Process(target=_make_slowly, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(log.read_text().splitlines()) == 1


def _die_halfway(cache: str) -> None:
    def make(into: str) -> None:
        Path(into, "file").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    make_once(cache, "thing", make)


def test_a_process_that_is_killed_leaves_no_half_model_and_no_lock(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(
        target=_die_halfway, args=(str(tmp_path),)
    )
    worker.start()
    worker.join(timeout=120)
    assert worker.exitcode == -signal.SIGKILL
    made = make_once(str(tmp_path), "thing", lambda into: _write(into, "whole"))
    assert Path(made, "file").read_text() == "whole"


def test_a_damaged_cached_model_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Path(make_once(str(tmp_path), "thing", lambda into: _write(into, "whole")))
    kept = make_once(str(tmp_path), "thing", lambda into: _write(into, "never"))
    assert Path(kept, "file").read_text() == "whole"
    (made / "file").write_text("wh0le")
    again = make_once(str(tmp_path), "thing", lambda into: _write(into, "new"))
    assert Path(again, "file").read_text() == "new"
    assert "damaged" in caplog.text


def _write(into: str, text: str) -> None:
    Path(into, "file").write_text(text)


def test_tokenizers_are_told_apart() -> None:
    one, same, other = (make_tokenizer(), make_tokenizer(), make_tokenizer(bos=True))
    assert models.tokenizer_fingerprint(one) == models.tokenizer_fingerprint(same)
    assert models.tokenizer_fingerprint(one) != models.tokenizer_fingerprint(other)


def test_a_tokenizer_that_splits_special_tokens_is_another() -> None:
    plain, splitting = make_tokenizer(), make_tokenizer()
    splitting.split_special_tokens = True
    assert plain.backend_tokenizer.to_str() == splitting.backend_tokenizer.to_str()
    assert models.tokenizer_fingerprint(plain) != models.tokenizer_fingerprint(splitting)


def test_an_adapter_beside_weights_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """transformers would put it on wherever peft is installed, and nowhere else."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter lies in it"):
        models.load_config(resolve(copy, tmp_path))


@pytest.mark.smollm2
def test_what_lies_beside_a_gguf_is_not_its_own(smollm2: Path, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    make_tokenizer().save_pretrained(beside)
    path = Path(shutil.copy(smollm2, beside))
    ref = model_files.resolve(ModelConfig(path=str(path), cache_dir=str(tmp_path / "cache")))
    assert len(models.load_tokenizer(ref)) == 49152


@pytest.mark.smollm2
def test_gguf_converts_to_the_same_tokens_and_finite_weights(smollm2: Path) -> None:
    ref = model_files.resolve(ModelConfig(path=str(smollm2)))
    assert ref.fingerprint.startswith("sha256:b179c9523d0e6a0f")
    tokenizer = models.load_tokenizer(ref)
    assert tokenizer.chat_template
    model = models.load(ref, torch.float32, torch.device("cpu"))
    assert model.config.max_position_embeddings == 8192
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_file_whose_content_changed_under_its_old_time_is_another(
    model_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    before = resolve(copy, tmp_path).fingerprint
    config = copy / "config.json"
    times = (config.stat().st_atime_ns, config.stat().st_mtime_ns)
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    os.utime(config, ns=times)  # as cp -p and rsync leave it
    assert resolve(copy, tmp_path).fingerprint != before


def test_a_directory_that_differs_on_this_node_is_refused(model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    ref = resolve(copy, tmp_path)
    config = copy / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(ModelError, match="on this node"):
        models.load(ref, torch.float32, torch.device("cpu"))


def test_a_model_at_a_url_is_identified_by_all_that_is_fetched(
    model_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    url = f"file://{copy}"
    before = model_files.resolve(ModelConfig(path=url, cache_dir=str(tmp_path / "cache")))
    tokenizer = copy / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("</s>", "<s>"))
    after = model_files.resolve(ModelConfig(path=url, cache_dir=str(tmp_path / "cache")))
    assert after.fingerprint != before.fingerprint
    with pytest.raises(ModelError, match="changed since this run began"):
        model_files.local_directory(before)  # what is there now is not what was resolved
    assert models.load_tokenizer(after).eos_token == "<s>"
