"""Compiled layers: on a GPU, what is not matrix product runs in fused kernels (torch.compile).

A layer is compiled once for all layers of its kind and all sizes of packs; attention stays as it is
(attention.py). CPUs, which gain little by it, are left alone.
"""

import functools
import importlib.util
import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger("cherry")


def repeated_layers(model: Any) -> list[nn.Module]:
    """The layers that a model's architecture repeats."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: Any) -> bool:
    """Have layers compiled when they first run; False where it gains nothing or cannot be done."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or (device := devices.pop()).type != "cuda":
        return False
    if fault := _why_not(device):
        log.warning(
            "%s; layers run uncompiled, which is slower. Compiling needs Triton and a C compiler.",
            fault,
        )
        return False
    for layer in repeated_layers(model):
        layer.compile(dynamic=True)  # in place
    return True


def run_as_written(model: Any) -> None:
    """Take `compile_layers` back."""
    for layer in repeated_layers(model):
        layer._compiled_call_impl = None  # what Module.compile sets, and has no opposite


@functools.cache
def _why_not(device: torch.device) -> str | None:
    """Why kernels cannot be compiled for a GPU; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as err:  # noqa: BLE001  # a compiler that is not there raises anything
        return f"{type(err).__name__}: {str(err).strip().splitlines()[-1] if str(err) else ''}"
    return None
