"""Checkpoints of a training: one object each, published whole, so that one that exists is good.

A checkpoint holds the whole state on one CPU, whatever the number of workers: it can be resumed by
another number of them. Two are kept.
"""

import io
import re
import zipfile
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from pipeline import listing, storage
from pipeline.errors import CherryError, TrainingError
from pipeline.parallel import agreed, rank, world_size

_KEPT = 2


def save(
    url: str, step: int, model: Any, optimizer: Optimizer, history: list[dict[str, Any]]
) -> None:
    """Publish the state after `step` steps; every worker must call it.

    Raises:
        StorageError: There is no room for it, or it could not be written; older ones remain.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    if rank():
        return
    state = {"step": step, "model": weights, "optimizer": moments, "history": history}
    name = storage.join(url, f"step-{step:08d}.pt")
    storage.publish_file(name, lambda path: _write(state, path))
    for old in sorted(_steps(url))[:-_KEPT]:
        storage.remove(storage.join(url, f"step-{old:08d}.pt"))


def load_latest(url: str, model: Any, optimizer: Optimizer) -> tuple[int, list[dict[str, Any]]]:
    """Restore the newest state, if there is one; every worker must call it.

    Returns:
        Steps that are done, and what was noted of them.

    Raises:
        TrainingError: It is damaged, or cannot be read.
    """
    state: dict[str, Any] = {"model": {}, "optimizer": {}}
    damaged = ""
    if not rank():  # eight copies of a whole state would not fit a node
        try:
            state = _read(url)
        except CherryError as err:
            damaged = str(err)
    step, history, damaged = agreed((state.get("step", 0), state.get("history", []), damaged))
    if damaged:
        raise TrainingError(damaged)
    if not step:
        return 0, []
    options = StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=world_size() > 1, strict=False
    )
    # Two calls: `set_state_dict` leaves the model out in workers that hold none of its weights.
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    return step, history


def _read(url: str) -> dict[str, Any]:
    """The newest checkpoint; empty if there is none."""
    step = max(_steps(url), default=0)
    if not step:
        return {}
    name = storage.join(url, f"step-{step:08d}.pt")
    data = io.BytesIO(storage.read_bytes(name))
    try:
        # PyTorch writes a checksum of each tensor, and does not look at it.
        if damaged := zipfile.ZipFile(data).testzip():
            raise zipfile.BadZipFile(damaged)
        data.seek(0)
        state: dict[str, Any] = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as err:  # zipfile and pickle have many
        raise TrainingError(
            f"{name}: not a readable checkpoint. Delete it and run again, to go on from the one "
            "before."
        ) from err
    return state


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """Trained parameters by name, on the CPU of the first worker; every worker must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def remove_all(url: str) -> None:
    """Remove the checkpoints of a training that is done."""
    for step in _steps(url):
        storage.remove(storage.join(url, f"step-{step:08d}.pt"))


def _write(state: Any, path: str) -> None:
    """`torch.save`, with what a full disk says as an OSError."""
    try:
        torch.save(state, path)
    except RuntimeError as err:  # of PyTorch's own writer
        raise OSError(f"writing {path}: {err}") from err


def _steps(url: str) -> list[int]:
    found = map(re.compile(r"step-(\d{8})\.pt").fullmatch, listing.list_names(url))
    return [int(match[1]) for match in found if match]
