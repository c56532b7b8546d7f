"""How the processes of a run work together: alone, as copies (DDP), or with every network in shards (FSDP2).

Everything else in training is written once, for whole tensors of named parameters; what differs is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from bkd.environment import Place, process_place, shards_networks
from bkd.models.load import best_device

T = TypeVar("T")
Kind = Literal["alone", "ddp", "fsdp2"]
PATIENCE = timedelta(hours=2)
"""How long processes wait for one that writes a checkpoint or draws pictures."""


@dataclass(frozen=True)
class Parallel:
    """This process among those that train together.

    Attributes:
        kind: How they share the work.
        place: Rank and number.
        device: Of this process.
    """

    kind: Kind
    place: Place
    device: torch.device

    def __str__(self) -> str:
        size = self.place.world_size
        return f"{size} process{'es' if size > 1 else ''}" + ("" if self.kind == "alone" else f" ({self.kind})")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.place.rank == 0

    def wrap(self, module: nn.Module) -> Callable[..., Any]:
        """What to call in place of a module that trains, so that all processes apply the same gradient.

        Args:
            module: On the device, with a gradient for every trainable parameter in every pass. With FSDP2 its
                parameters become shards, under the same names.
        """
        if self.kind == "ddp":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return DistributedDataParallel(
                module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.shard(module)
        return module

    def shard(self, module: nn.Module) -> None:
        """With FSDP2, split a module's parameters among the processes, block by block; else nothing."""
        if self.kind != "fsdp2":
            return
        mesh = init_device_mesh(self.device.type, (self.place.world_size,))
        for child in module.children():
            for block in child if isinstance(child, nn.ModuleList) else (child,):
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)

    @contextmanager
    def gathering(self, forward: Callable[..., Any], *, last: bool) -> Iterator[None]:
        """Around a pass: copies exchange gradients after a step's last pass only.

        Shards exchange them after each: to keep whole gradients until then would take the memory that sharding saves.
        """
        if isinstance(forward, DistributedDataParallel) and not last:
            with forward.no_sync():
                yield
        else:
            yield

    def mean(self, values: Tensor) -> Tensor:
        """Average of a tensor over the processes."""
        if self.kind != "alone":
            dist.all_reduce(values)
            values /= self.place.world_size
        return values

    def sum_of_shards(self, values: Tensor) -> Tensor:
        """Sum over the processes of what each computed from its own shards."""
        if self.kind == "fsdp2":
            dist.all_reduce(values)
        return values

    def collected(self, tensor: Tensor) -> Tensor:
        """A tensor in full, on the CPU of the main process; nothing on the others, which must ask together with it.

        One at a time: together they may not fit a device.
        """
        full: Tensor = tensor.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor()
        return full.cpu() if self.is_main else full.new_empty(0)

    def agree(self, value: T) -> T:
        """The main process's value, for all."""
        if self.kind == "alone":
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def start_parallel(wish: Literal["auto", "ddp", "fsdp2"]) -> Parallel:
    """Meet the other processes that `accelerate launch`, `torchrun` or `srun` started; alone there is nothing to do.

    Args:
        wish: As in the recipe; see `shards_networks`.
    """
    device, place = best_device(), process_place()
    if place.world_size == 1 and wish != "fsdp2":
        return Parallel("alone", place, device)
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    return Parallel("fsdp2" if shards_networks(wish) else "ddp", place, device)


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; in-place changes of it change the tensor."""
    local: Tensor = tensor.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def shards_like(part: Tensor, reference: Tensor) -> Tensor:
    """What every process holds a part of, where `reference` is sharded; else the part itself."""
    if not isinstance(reference, DTensor):
        return part
    return DTensor.from_local(
        part,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def split_like(full: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor in the form of another one of its shape: sharded as that is, on its device."""
    placed = full.to(reference.device)
    if isinstance(reference, DTensor):
        return distribute_tensor(placed, reference.device_mesh, reference.placements, src_data_rank=None)
    return placed
