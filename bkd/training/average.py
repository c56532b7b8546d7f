"""The exponential moving average of the weights, which becomes the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from bkd.training.parallel import own


class Average:
    """A shadow of the trainable parameters: shadow += (1 - d) (parameter - shadow) after each step.

    The decay d starts low, as in diffusers: min(decay, (1 + n) / (10 + n)) after n steps, so that a short run is not an
    average of its start.

    Args:
        parameters: By name; shards stay shards.
        decay: 0 for none: the average is then the parameters themselves.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay
        self._parameters = dict(parameters)
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()} if decay else self._parameters

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After 1-based `step`."""
        if self._decay:
            decay = min(self._decay, step / (9 + step))
            torch._foreach_lerp_(self._shadow(), self._weights(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For as long as the context lasts, the parameters hold the average."""
        before = [weight.clone() for weight in self._weights()] if self._decay else []
        self.apply()
        try:
            yield
        finally:
            if before:
                torch._foreach_copy_(self._weights(), before)

    def apply(self) -> None:
        """Put the average into the parameters for good."""
        if self._decay:
            torch._foreach_copy_(self._weights(), self._shadow())

    def _weights(self) -> list[Tensor]:
        return [own(parameter) for parameter in self._parameters.values()]

    def _shadow(self) -> list[Tensor]:
        return [own(tensor) for tensor in self.tensors.values()]
