"""The optimizer, its learning rate, and the guard that leaves everything as it was when a gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bkd.errors import EnvironmentProblem
from bkd.recipe.schema import Train
from bkd.training.parallel import Parallel, own, shards_like, split_like


def learning_rate(train: Train, step: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then the schedule; a pure function, so there is no state."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.max_steps - train.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return train.lr * factor[train.lr_schedule]


@dataclass(frozen=True)
class Gradient:
    """Sizes of a step's gradient before clipping, on the device; not finite where the step was skipped.

    Attributes:
        norm: Scalar.
        names: Parameters that have one.
        norms: (P,), of each.
    """

    norm: Tensor
    names: tuple[str, ...]
    norms: Tensor


class GuardedOptimizer:
    """Backward pass, clipping and update; a step whose gradient is not finite changes nothing.

    Whether it is finite is known on the device only: fused optimizers read that flag there, so the host need not wait.
    The 8-bit optimizer cannot, and waits. Of sharded parameters the optimizer sees the part that lies here, as a
    plain tensor: not every fused kernel knows shards.

    Args:
        train: Settings.
        parameters: Trainable, by name.
        parallel: This process among the others.
    """

    def __init__(self, train: Train, parameters: Mapping[str, nn.Parameter], parallel: Parallel) -> None:
        self._parameters, self._parallel = dict(parameters), parallel
        self._max_norm = train.max_grad_norm or math.inf
        self._fused = train.optimizer != "adamw-8bit"
        self._parts = {name: _part_here(p) for name, p in parameters.items()}
        self._optimizer = _build(train, list(self._parts.values()))
        device = parallel.device.type
        self._scaler = torch.amp.GradScaler(device) if train.mixed_precision == "fp16" else None

    def backward(self, loss: Tensor) -> None:
        """Add a pass's gradients; those of a loss that is not finite are NaN, in every process."""
        # A loss can overflow where its gradient does not.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        (self._scaler.scale(loss) if self._scaler is not None else loss).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, lr: float) -> Gradient:
        """Clip, update, and forget the gradients."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        named = {name: own(p.grad) for name, p in self._parameters.items() if p.grad is not None}
        for name, part in self._parts.items():
            part.grad = named.get(name)
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        gradients = list(named.values())
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        squares = self._parallel.sum_of_shards(squares)
        norm = squares.sum().sqrt()
        if self._max_norm < math.inf:
            torch._foreach_mul_(gradients, torch.clamp(self._max_norm / (norm + 1e-6), max=1.0))
        self._update(norm)
        for parameter in (*self._parameters.values(), *self._parts.values()):
            parameter.grad = None
        return Gradient(norm, tuple(named), squares.sqrt())

    def _update(self, norm: Tensor) -> None:
        if self._scaler is not None:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        elif self._fused:
            # What GradScaler sets, too: fused kernels then leave weights, moments and step counts alone.
            self._optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._optimizer.step()
        elif bool(norm.isfinite()):
            self._optimizer.step()

    def state(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> its state, tensors in full on the main process; all processes must ask together."""
        return {
            name: {key: self._in_full(value, name) for key, value in state.items()}
            for name, part in self._parts.items()
            if (state := self._optimizer.state.get(part))
        }

    def _in_full(self, value: Any, name: str) -> Any:
        """One with the shape of the part belongs to it; anything else is small and the same everywhere."""
        if not isinstance(value, Tensor) or value.shape != self._parts[name].shape:
            return value
        return self._parallel.collected(shards_like(value, self._parameters[name]))

    def scaler_state(self) -> dict[str, Any]:
        return self._scaler.state_dict() if self._scaler is not None else {}

    def load(self, state: Mapping[str, Mapping[str, Any]], scaler: Mapping[str, Any]) -> None:
        """Continue from what `state` and `scaler_state` said."""
        indexed = {
            index: {key: _placed(value, parameter) for key, value in state[name].items()}
            for index, (name, parameter) in enumerate(self._parameters.items())
            if name in state
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": indexed, "param_groups": groups})
        if self._scaler is not None:
            self._scaler.load_state_dict(dict(scaler))


def _part_here(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter, or the shard of it that this process holds, in the same memory."""
    return nn.Parameter(own(parameter)) if isinstance(parameter, DTensor) else parameter


def _placed(value: Any, parameter: Tensor) -> Any:
    """A state as its parameter lies: one of its shape is split like it."""
    same_shape = isinstance(value, Tensor) and value.shape == parameter.shape
    return own(split_like(value, parameter)) if same_shape else value


def _build(train: Train, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=True)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise EnvironmentProblem(
            "the 8-bit optimizer needs bitsandbytes",
            where="train.optimizer",
            got=error,
            remedy="pip install 'bkd[8bit]', or train.optimizer=adamw",
        ) from error
    eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay
    )
    return eight_bit
