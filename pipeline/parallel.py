"""The workers of a training: how many there are, and how they share weights and gradients."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pipeline.compiled import repeated_layers

T = TypeVar("T")


def world_size() -> int:
    """Workers; one without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This worker's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: T) -> T:
    """What the first worker has, for all of them; every worker must call it."""
    found: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    shared: T = found[0]
    return shared


def sum_over_workers(values: Tensor) -> Tensor:
    """The sum of what each worker has; every worker must call it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def parallel(module: nn.Module, model: Any, per_replica: int, dtype: torch.dtype) -> nn.Module:
    """A module whose gradients are averaged over all workers.

    DDP, or FSDP2 where a copy of the weights is shared; a lone worker needs neither.

    Args:
        module: What is called; it holds `model`.
        model: A transformers model.
        per_replica: Workers that share one copy of the weights.
        dtype: Of matrix products.
    """
    world = world_size()
    if world == 1:
        return module
    if per_replica == 1:
        # Text alone leaves the other parts of a model with images without gradients.
        several_parts = model.config.get_text_config() is not model.config
        return DistributedDataParallel(module, find_unused_parameters=several_parts)
    shape = (world // per_replica, per_replica)
    mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=("replica", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    used = mesh if shape[0] > 1 else mesh["shard"]
    for layer in repeated_layers(model):  # gathered and freed one at a time
        fully_shard(layer, mesh=used, mp_policy=policy)
    fully_shard(module, mesh=used, mp_policy=policy)  # in place
    return module


def synchronised(wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are averaged over the workers with the last pack only.

    FSDP still reduces them over the shards in each pack: else each worker would hold those of the
    whole model.
    """
    if isinstance(wrapped, DistributedDataParallel):
        return nullcontext() if last else wrapped.no_sync()
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_all_reduce(last)
    return nullcontext()
