"""How many bytes of tensors are alive, and how many were at most: counted where no allocator keeps such a record."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every storage that an operation makes, for as long as the context lasts; fake ones count like others.

    What kernels use inside themselves is not seen.

    Args:
        there: Tensors that are alive already.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in there:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)
        return tensor

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def distinct_bytes(tensors: Iterable[Tensor], known: set[int]) -> int:
    """Bytes of the storages behind some tensors, each counted once.

    Args:
        tensors: Any.
        known: Storages counted before; theirs are added.
    """
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            total += storage.nbytes()
    return total


def as_fake(network: torch.nn.Module, made: dict[int, torch.nn.Parameter]) -> None:
    """Replace a network's tensors, which may be on the meta device, by fake ones on the CPU; in a `FakeTensorMode`.

    Args:
        network: Changed in place.
        made: From the identity of a parameter to its replacement: networks that shared one share the other.
    """
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
