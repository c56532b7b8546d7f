"""FeatureTap: read the outputs of named modules during a forward pass, without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bkd.errors import ModelError, suggest

T = TypeVar("T")


class FeatureTap:
    """Record what the named modules of a model return, in the passes run through it, for as long as the context lasts.

    Attach it to the plain module, not to a DDP or FSDP wrapper of it: names then mean the same at any world size. The
    hooks stay where they are for the length of the context, because compiled code does not look for new ones. They
    record only inside `run`: gradient checkpointing calls modules a second time during the backward pass. A block that
    returns a tuple (diffusers' down blocks) is read at its first element, the hidden states.

        with FeatureTap(unet, ["down_blocks.0", "mid_block"]) as tap:
            output, features = tap.run(lambda: unet(...))

    Args:
        model: Any module.
        names: Module paths, as in `model.named_modules()`.

    Raises:
        ModelError: If a name is not a module of the model; says which and names the nearest.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                raise ModelError(
                    f"no module '{name}' to read features from{suggest(name, modules)}", where=type(model).__name__
                )
        self._names = tuple(names)
        self._modules = [modules[name] for name in names]
        self._handles: list[RemovableHandle] = []
        self._features: dict[str, Tensor] = {}
        self._recording = False

    def __enter__(self) -> FeatureTap:
        for name, module in zip(self._names, self._modules, strict=True):
            self._handles.append(module.register_forward_hook(self._recorder(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(self, forward: Callable[[], T]) -> tuple[T, list[Tensor]]:
        """Call something that runs the model; the tap keeps nothing of it.

        Returns:
            What it returned, and the recorded outputs in the order of the names.

        Raises:
            ModelError: If a named module did not run.
        """
        self._recording = True
        try:
            output = forward()
            silent = [name for name in self._names if name not in self._features]
            if silent:
                raise ModelError(
                    f"modules did not run: {', '.join(silent)}",
                    remedy="choose sites that the forward pass goes through",
                )
            return output, [self._features[name] for name in self._names]
        finally:
            self._recording = False
            self._features.clear()

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if self._recording:
                self._features[name] = output[0] if isinstance(output, tuple) else output

        return record
