"""The loop of one worker against plain transformers, and against itself in other forms."""

import itertools
import math
import os
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import longrope, on_a_full_disk, tiny_model
from safetensors.torch import load_file, save_file

from pipeline import training
from pipeline.adapters import add_adapters
from pipeline.batches import count_steps, learning_rate, rows_of_step
from pipeline.config_training import LoraConfig, TrainConfig
from pipeline.errors import ConfigError, ModelError, StorageError, TrainingError
from pipeline.training_data import Examples
from pipeline.training_loop import StepDone, train
from pipeline.watching import Silence

CONFIG = TrainConfig(
    epochs=2, batch_rows=5, learning_rate=1e-2, max_batch_tokens=64, checkpoint_steps=2,
    weight_decay=0.1,
)  # fmt: skip


def make_examples(num_rows: int = 12, seed: int = 0) -> Examples:
    """Random rows of 4 to 40 tokens, whose last half, less one token in between, has a loss."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, 40, num_rows)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    targets = np.zeros(starts[-1], np.bool_)
    for start, end in itertools.pairwise(starts.tolist()):
        targets[(start + end) // 2 : end] = True
        targets[end - 2] = False
    ids = draw.integers(0, 640, starts[-1]).astype(np.int32)
    return Examples(ids, targets, starts)


def run(
    config: TrainConfig = CONFIG,
    examples: Examples | None = None,
    *,
    model: Any = None,
    url: str | None = None,
    dtype: torch.dtype = torch.float32,
    stop_after: int = 10**9,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    def report(step: StepDone) -> None:
        if step.step >= stop_after:
            raise KeyboardInterrupt

    return train(
        model or tiny_model("Llama"),
        examples or make_examples(),
        config,
        dtype,
        url,
        report,
        max_length=256,
    )


def plain_training(model: Any, examples: Examples, config: TrainConfig) -> list[float]:
    """Row by row through transformers' own eager attention and logits; updates `model`."""
    model.set_attn_implementation("eager")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay},
         {"params": others, "weight_decay": 0.0}]
    )  # fmt: skip
    losses = []
    num_steps = count_steps(len(examples), config)
    for step in range(num_steps):
        nll = torch.zeros(())
        num_targets = 0
        for row in rows_of_step(len(examples), config, step):
            span = slice(examples.starts[row], examples.starts[row + 1])
            ids = torch.from_numpy(examples.ids[span]).long()
            mask = torch.from_numpy(examples.targets[span])
            logits = model(ids[None]).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            nll = nll + each[mask[1:]].sum()
            num_targets += int(mask.sum())
        loss = nll / num_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, num_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("GPT2", {}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 8}),
        ("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    ],
)
def test_training_equals_plain_transformers(family: str, changes: dict[str, Any]) -> None:
    # Adam divides a gradient by its own size, so one that is all rounding makes a step of full
    # length either way; seed 0 has one in Mistral's embeddings on some CPUs.
    expected = tiny_model(family, seed=3, **changes)
    losses = plain_training(expected, make_examples(), CONFIG)
    weights, history = run(model=tiny_model(family, seed=3, **changes))
    assert [step["loss"] for step in history] == pytest.approx(losses, rel=1e-4)
    for name, parameter in expected.named_parameters():
        if name.endswith("c_attn.bias"):
            continue  # a key's bias changes no softmax: its gradient is rounding, which Adam scales
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-2, atol=2e-4)


def test_longrope_rows_train_as_if_they_were_alone() -> None:
    """Transformers takes the frequencies of all from the longest of a pass."""
    config = CONFIG.model_copy(update={"max_steps": 1, "batch_rows": 12})
    losses = plain_training(tiny_model("Phi3", **longrope(20)), make_examples(), config)
    found = run(config, model=tiny_model("Phi3", **longrope(20)))[1]
    assert [step["loss"] for step in found] == pytest.approx(losses, rel=1e-6)


def test_padded_models_train_too(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run()[1]
    monkeypatch.setattr("pipeline.training_loop.find_fault", lambda *_: "of a test")
    found = run()[1]
    assert [s["loss"] for s in found] == pytest.approx([s["loss"] for s in expected], rel=1e-4)


def test_logits_that_are_no_plain_projection_are_the_models_own() -> None:
    def doubled() -> Any:
        model = tiny_model("Llama")
        model.lm_head.register_forward_hook(lambda *call: 2 * call[2])
        return model

    losses = plain_training(doubled(), make_examples(), CONFIG)
    found = run(model=doubled())[1]
    assert [step["loss"] for step in found] == pytest.approx(losses, rel=1e-4)


def test_bfloat16_follows_float32() -> None:
    expected, found = run()[1], run(dtype=torch.bfloat16)[1]
    assert [s["loss"] for s in found] == pytest.approx([s["loss"] for s in expected], rel=0.05)
    assert found != expected


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    weights, history = run()
    url = str(tmp_path / "checkpoints")
    with pytest.raises(KeyboardInterrupt):
        run(url=url, stop_after=5)
    assert sorted(os.listdir(url)) == ["step-00000002.pt", "step-00000004.pt"]
    resumed, whole = run(url=url)
    assert whole == history
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    # A checkpoint is never unpickled as code.
    torch.load(os.path.join(url, "step-00000004.pt"), weights_only=True)


@pytest.mark.parametrize("damage", ["no checkpoint", "hello world" * 100, "a flipped bit"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(url=str(tmp_path), stop_after=3)
    newest = tmp_path / "step-00000002.pt"
    data = damage.encode()
    if damage == "a flipped bit":
        with zipfile.ZipFile(newest) as archive:  # of a weight, in the middle of the largest record
            record = max(archive.infolist(), key=lambda info: info.file_size)
        at = record.header_offset + record.file_size // 2
        whole = newest.read_bytes()
        data = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    newest.write_bytes(data)
    (tmp_path / "step-of-somebody-else.pt").touch()
    with pytest.raises(TrainingError, match=r"step-00000002\.pt: not a readable checkpoint"):
        run(url=str(tmp_path))


def test_a_loss_that_is_not_finite_ends_before_the_step(tmp_path: Path) -> None:
    model = tiny_model("Llama")
    with torch.no_grad():
        model.lm_head.weight[7, 3] = math.inf
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingError, match=r"step 1: the loss is (nan|inf)"):
        run(model=model, url=str(tmp_path))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not list(tmp_path.iterdir())


def _with_checkpoints(url: str) -> None:
    run(url=url)


def test_a_full_disk_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"step-00000002\.pt: cannot be written"):
        on_a_full_disk(_with_checkpoints, str(tmp_path / "checkpoints"))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_adapters_are_trained_alone_and_merged(tmp_path: Path) -> None:
    base = tiny_model("Llama")
    adapted = add_adapters(tiny_model("Llama"), LoraConfig(rank=4), seed=0)
    weights, history = run(model=adapted.get_base_model(), url=str(tmp_path))
    assert history[-1]["loss"] < history[0]["loss"]
    assert all("lora_" in name for name in weights)
    again = add_adapters(tiny_model("Llama"), LoraConfig(rank=4), seed=0)
    assert not again.get_base_model().load_state_dict(weights, strict=False).unexpected_keys
    merged = again.merge_and_unload()
    ids = torch.arange(20)[None]
    adapted.eval().set_attn_implementation("eager")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-2)


def test_only_adapters_have_dropout() -> None:
    runs = [
        run(
            model=add_adapters(tiny_model("Llama"), LoraConfig(dropout=p), seed=0).get_base_model()
        )[1]
        for p in (0.0, 0.5, 0.5)
    ]
    assert runs[0] != runs[1] == runs[2]  # drawn from the seed and the step


def test_unknown_modules_of_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.lora\.targets"):
        add_adapters(tiny_model("Llama"), LoraConfig(targets=["nowhere"]), seed=0)


@pytest.mark.parametrize(
    ("error", "tried_again"),
    [(ConfigError, False), (ModelError, False), (TrainingError, False), (StorageError, True)],
)
def test_what_would_come_again_is_not_tried_again(
    error: type[Exception], tried_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train makes workers that raise anew, each with its model; what is said ends it all."""

    def fail(*_: Any) -> None:
        raise error("it is wrong")

    rank = SimpleNamespace(get_context=lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setattr(training, "ray", SimpleNamespace(train=rank))
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(training, "agreed", lambda _: False)
    monkeypatch.setattr(training.manifests, "find", lambda _: None)
    monkeypatch.setattr(training, "_train_here", fail)
    said: list[object] = []
    job = SimpleNamespace(url="nowhere", threads=torch.get_num_threads())
    config = {"said": SimpleNamespace(put=said.append), "jobs": [job]}
    with pytest.raises(error) if tried_again else nullcontext():
        training._worker(config)
    assert [type(what) for what in said] == [error]


def test_a_progress_that_breaks_hides_nothing_that_workers_say() -> None:
    lost = TrainingError("its loss is not finite")
    messages = iter(["training on rows", StepDone(1, 2, 3.0, 4e-5, 5, 6.0), lost, None])
    said: Any = SimpleNamespace(get=lambda: next(messages))
    broken: list[Exception] = []
    told: list[Any] = [ModelError("of workers that were replaced")]

    class Broken(Silence):
        def step(self, step: StepDone) -> None:
            raise OSError("the terminal is gone")

    training._listen(said, Broken(), told, broken)
    assert told == [lost]
    assert [str(err) for err in broken] == ["the terminal is gone"]


@pytest.mark.parametrize("step", ["_train_here", "_publish_files"])
def test_the_seed_of_a_training_is_its_adapters(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    def begin(_model: object, _config: object, seed: int) -> None:
        raise Begun(seed)

    files = SimpleNamespace(load=lambda *_: None, load_config=lambda _: SimpleNamespace(dtype=None))
    monkeypatch.setattr(training, "models", files)
    monkeypatch.setattr(training, "add_adapters", begin)
    job = SimpleNamespace(model=None, config=TrainConfig(lora=LoraConfig(), seed=7))
    arguments = {"_train_here": (torch.device("cpu"), None), "_publish_files": ({},)}[step]
    with pytest.raises(Begun, match="7"):
        getattr(training, step)(job, *arguments)


def test_adapters_begin_by_the_seed_whatever_came_before() -> None:
    """Replicas whose adapters differ would average gradients of different models."""

    def begin(seed: int) -> list[torch.Tensor]:
        torch.rand(seed + 3)  # another training in the same worker
        adapted = add_adapters(tiny_model("Llama"), LoraConfig(), seed).get_base_model()
        return [p.detach() for name, p in adapted.named_parameters() if "lora_A" in name]

    one, again, other = begin(1), begin(1), begin(2)
    assert all(map(torch.equal, one, again))
    assert not any(map(torch.equal, one, other))


def _worker(rank: int, world: int, per_replica: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    config = CONFIG.model_copy(update={"gpus_per_replica": per_replica})
    url = os.path.join(folder, "checkpoints")
    try:
        run(config, url=url, stop_after=5)
    except KeyboardInterrupt:  # and on from the checkpoint
        weights, history = run(config, url=url)
    if rank == 0:
        save_file({k: v.contiguous() for k, v in weights.items()}, os.path.join(folder, "weights"))
        losses = torch.tensor([step["loss"] for step in history])
        save_file({"losses": losses}, os.path.join(folder, "losses"))
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "per_replica"), [(2, 1), (2, 2), (4, 2)])
def test_workers_do_as_one_does(tmp_path: Path, world: int, per_replica: int) -> None:
    weights, history = run()
    mp.spawn(_worker, (world, per_replica, str(tmp_path)), nprocs=world)
    losses = load_file(tmp_path / "losses")["losses"].tolist()
    assert losses == pytest.approx([step["loss"] for step in history], rel=1e-4)
    found = load_file(tmp_path / "weights")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=2e-4)


def test_held_out_rows_are_judged_without_dropout() -> None:
    losses = []
    for dropout in (0.0, 0.5):
        model = add_adapters(
            tiny_model("Llama"), LoraConfig(dropout=dropout), seed=0
        ).get_base_model()
        with torch.no_grad():  # a new adapter adds nothing, whatever is dropped
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        history = train(
            model, make_examples(), CONFIG, torch.float32, None, lambda _: None, max_length=256,
            held_out={"set": make_examples(6, seed=1)},
        )[1]  # fmt: skip
        losses.append(history[0]["held_out"]["set"]["loss"])
        assert history[-1]["held_out"]["set"]["loss"] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # dropout changes it by more than 1e-3
