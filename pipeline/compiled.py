"""What is compiled: kernels of our own, and layers, in which torch.compile fuses what it can.

A layer is compiled as a whole, once for all sizes of packs and all layers that ask for the same of
their attention, which is one operation of it (attention.py). A CPU gains less than a short run
loses by compiling: its layers are compiled where a job is long (job.py) or where it is asked for.
"""

import functools
import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import nn

from pipeline import cpu_kernels

log = logging.getLogger("cherry")

Compiled = Literal["auto"] | bool


def repeated_layers(model: Any) -> list[nn.Module]:
    """The layers that a model's architecture repeats."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: Any, compiled: Compiled) -> bool:
    """Have layers compiled when they first run; returns whether kernels may run, too.

    Args:
        model: A transformers causal LM, on its device or devices.
        compiled: True is all that can be; `auto` leaves the layers of a CPU out.
    """
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop()
    on_cpu = device.type == "cpu"
    if not compiled or devices or not (on_cpu or device.type == "cuda"):
        return False
    if on_cpu and compiled == "auto":
        return cpu_kernels.can_run()
    if fault := _why_not(device):
        log.warning(
            "%s; layers run uncompiled, which is slower. Compiling needs %s.",
            fault,
            "a C++ compiler" if on_cpu else "Triton and a C compiler",
        )
        return on_cpu and cpu_kernels.can_run()
    for layer in repeated_layers(model):
        layer.compile(dynamic=True)  # in place
    return True


def what_runs_compiled(model: Any, kernels: bool) -> Literal["layers", "kernels", "nothing"]:
    """What came of it, for the metadata of a part: with layers go the kernels that a device has."""
    if any(layer._compiled_call_impl is not None for layer in repeated_layers(model)):
        return "layers"
    on_cpu = next(model.parameters()).device.type == "cpu"
    return "kernels" if kernels and (not on_cpu or cpu_kernels.can_run()) else "nothing"


def run_as_written(model: Any) -> None:
    """Take `compile_layers` back."""
    for layer in repeated_layers(model):
        layer._compiled_call_impl = None  # what Module.compile sets, and has no opposite


@functools.cache
def _why_not(device: torch.device) -> str | None:
    """Why torch.compile cannot compile for a device; None if it can."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as err:  # noqa: BLE001  # a compiler that is not there raises anything
        return f"{type(err).__name__}: {next(iter(str(err).strip().splitlines()), '')}"
    return None
