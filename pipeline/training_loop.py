"""The training of one worker: packs in, a trained model out. Torch only, no Ray.

::

    step    its rows -> packs, equally many for each worker -> summed loss of the answers' tokens
            -> gradients, averaged once -> is the loss finite? -> clip, AdamW

A step's loss is the mean over the answers' tokens of all its rows, so that neither packs nor
workers weigh rows.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import batches, checkpoints
from pipeline.config_training import TrainConfig
from pipeline.devices import fast_float32
from pipeline.errors import TrainingError
from pipeline.forward import longest_together
from pipeline.parallel import parallel, rank, sum_over_workers, synchronised, world_size
from pipeline.probe import find_fault
from pipeline.response_loss import ResponseLoss, evaluate, forward_pack
from pipeline.training_data import Examples

log = logging.getLogger("cherry")


@dataclass(frozen=True)
class StepDone:
    """One optimiser step."""

    step: int
    """From 1."""
    num_steps: int
    loss: float
    """Nats a token of the answers, before the step."""
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Of all rows of the step, over all workers."""
    seconds: float


def train(
    model: Any,
    examples: Examples,
    config: TrainConfig,
    dtype: torch.dtype,
    checkpoints_url: str | None,
    report: Callable[[StepDone], None],
    *,
    max_length: int,
    held_out: dict[str, Examples] | None = None,
    points: int = 2,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train a model from its newest checkpoint on, or from the start.

    Every worker of the process group calls it with the same arguments; without a process group
    there is one worker.

    Args:
        model: A causal LM with float32 weights, on this worker's device; adapters already in it.
        examples: All rows.
        config: Of the training.
        dtype: Of matrix products.
        checkpoints_url: Where checkpoints are; None for no checkpoints.
        report: Called after each step.
        max_length: Of a row, in tokens.
        held_out: Sets to evaluate along the way, by name.
        points: Steps at which they are, the first (before any training) and the last among them.

    Returns:
        The trained parameters (whole, on the CPU, by name; empty but on the first worker), and
        what was noted of each step: its loss, and of held-out sets `{"loss": nats a token,
        "exact_match": share of rows}` after it.

    Raises:
        TrainingError: A loss or a gradient is not finite; no step was made with it.
    """
    world = world_size()
    fault = find_fault(model.eval(), max_length, dtype)  # with dropout no two runs are alike
    padded = fault is not None
    if padded:
        name = type(model).__name__
        log.warning("%s: %s; training in padded batches instead, which is slower", name, fault)
    # The model's own dropout stays off: packed attention has none, and few epochs need none.
    for name, module in model.named_modules():
        module.train(name.endswith("lora_dropout.default"))
    deal = partial(
        batches.deal_packs,
        workers=world,
        max_tokens=config.max_batch_tokens,
        padded=padded,
        longest_together=longest_together(model.config.get_text_config()),
    )
    wrapped = parallel(ResponseLoss(model, not padded), model, config.gpus_per_replica, dtype)
    optimizer = _optimizer(model, config)
    num_steps = batches.count_steps(len(examples), config)
    start = 0
    history: list[dict[str, Any]] = []
    if checkpoints_url:
        start, history = checkpoints.load_latest(checkpoints_url, model, optimizer)
    sets = held_out or {}
    evaluated = np.linspace(0, num_steps, points).round().astype(int).tolist() if sets else []
    if sets and not history:
        history.append({"step": 0, "held_out": evaluate(wrapped, sets, deal, dtype)})
    lengths = examples.lengths
    for step in range(start, num_steps):
        begun = time.monotonic()
        torch.manual_seed(config.seed * 1_000_003 + step * world + rank())  # of dropout
        rows = batches.rows_of_step(len(examples), config, step)
        packs = [rows[pack] for pack in deal(lengths[rows].tolist())[rank()]]
        num_targets = sum(int(examples.targets[examples.span(r)].sum()) for r in rows)
        loss = _backward(wrapped, examples, packs, rows, world / num_targets, dtype) / world
        rate = batches.learning_rate(config, step, num_steps)
        norm = _update(model, optimizer, loss, config, rate, step)
        done = StepDone(
            step=step + 1,
            num_steps=num_steps,
            loss=loss,
            grad_norm=norm,
            tokens=int(lengths[rows].sum()),
            seconds=time.monotonic() - begun,
        )
        noted: dict[str, Any] = {"step": step + 1, "loss": loss, "grad_norm": norm}
        if step + 1 in evaluated:
            noted["held_out"] = evaluate(wrapped, sets, deal, dtype)
        history.append(noted)
        report(done)
        if checkpoints_url and done.step % config.checkpoint_steps == 0 and done.step < num_steps:
            checkpoints.save(checkpoints_url, done.step, model, optimizer, history)
    return checkpoints.whole_weights(model), history


def _optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate)


def _backward(
    wrapped: nn.Module,
    examples: Examples,
    packs: list[Any],
    rows: Any,
    scale: float,
    dtype: torch.dtype,
) -> float:
    """Gradients of all packs; returns the scaled loss, summed over all workers."""
    total = torch.zeros((), dtype=torch.float64, device=next(wrapped.parameters()).device)
    for number, pack in enumerate(packs):
        weight = scale if len(pack) else 0.0
        # Workers wait for each other: one without a row joins in with one that weighs nothing.
        some = pack if len(pack) else rows[:1]
        last = number == len(packs) - 1
        with synchronised(wrapped, last), fast_float32(total.device):
            nll = forward_pack(wrapped, examples, some, dtype)
            (nll * weight).backward()
        total += nll.detach().double() * weight
    return float(sum_over_workers(total))


def _update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    loss: float,
    config: TrainConfig,
    rate: float,
    step: int,
) -> float:
    """Clip and step, unless something is not finite; the norm of the gradient before clipping."""
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    if not (math.isfinite(loss) and math.isfinite(float(norm))):
        raise TrainingError(
            f"training: step {step + 1}: the loss is {loss:g} and its gradient {float(norm):g}, "
            "expected finite numbers; the step was not made. Set a lower train.learning_rate, or "
            "train.dtype: float32."
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)
