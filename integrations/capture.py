"""The one hook mechanism: what a forward of the whole model sees inside, collected by reference,
used when it ends.

The hooks are bound methods of a plain object, so `copy.deepcopy(model)` copies them with the model.
Nothing is computed inside a layer's hook: checkpointing would lose the gradient there, or compute
twice. Checkpointing may also fire a hook again when it recomputes, so the first capture of a
forward wins and the end of the outer call disarms.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .families import Parts


@dataclass
class Seen:
    """References from one forward: its arguments by name, and the tensors that came by."""

    inputs: dict[str, Any]
    parts: Parts
    hidden: dict[int, Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None
    first: Tensor | None = None
    projector: list[Tensor] = field(default_factory=list)
    autocast: dict[int, tuple[str, bool, torch.dtype]] = field(default_factory=dict)

    def anchor(self) -> Tensor:
        """The embeddings (B, T, d) as they enter the text model (or, if it merges them itself, its
        first layer)."""
        found = self.embeds if self.embeds is not None else self.first
        if found is None:
            raise RuntimeError(
                "anchor: neither the text model nor its first layer ran in this forward"
            )
        return found

    def layer(self, number: int) -> Tensor:
        """What `number` decoder layers made (B, T, d)."""
        if number not in self.hidden:
            raise RuntimeError(f"layer: decoder layer {number} did not run in this forward")
        return self.parts.family.hidden(self.hidden[number], self.parts.config)

    def autocast_of(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """The autocast state that decoder layer `number` ran in: wrappers autocast `forward`, the
        end is outside it."""
        device, enabled, dtype = self.autocast[number]
        return (
            torch.autocast(device, dtype=dtype, enabled=True)
            if enabled
            else torch.autocast(device, enabled=False)
        )


def _nothing(_: Any) -> None:
    pass


class Capture:
    """Hooks on `outer` and on `parts` of it; `remove()` takes them off.

    Args:
        outer: the module whose call is "the forward".
        parts: its parts.
        layers: numbers in 1..L; number l is what l decoder layers made.
        start: gets the module that is called (a compiler may have put another in the place of
            `outer`, with its hooks) and the forward's arguments by name, says whether to capture.
        finish: gets the forward's output and what was seen, returns the output.
        missed: called with the text model when it runs outside a call of `outer`.
        skipped: gets the output of a forward that was not captured.
    """

    def __init__(
        self,
        outer: nn.Module,
        parts: Parts,
        layers: tuple[int, ...],
        start: Callable[[nn.Module, dict[str, Any]], bool],
        finish: Callable[[Any, Seen], Any],
        missed: Callable[[nn.Module], None] = _nothing,
        skipped: Callable[[Any], None] = _nothing,
    ) -> None:
        global _untraced
        _untraced = torch.compiler.disable(_call)  # not at import: it imports the compiler
        self.start, self.finish, self.missed, self.skipped = start, finish, missed, skipped
        self.parts = parts
        self.seen: Seen | None = None
        self.inside = False
        self.merge = parts.merge
        self.numbers = {}
        self.hooks = [
            # before others, which may put embeddings in the place of input_ids
            outer.register_forward_pre_hook(self._open, with_kwargs=True, prepend=True),
            # always_call: an exception inside the forward must not keep its activations alive
            outer.register_forward_hook(self._close, always_call=True),
            parts.layers[0].register_forward_pre_hook(self._first, with_kwargs=True),
        ]
        if parts.text is not None:
            self.hooks.append(parts.text.register_forward_pre_hook(self._text, with_kwargs=True))
        if parts.projector is not None:
            self.hooks.append(
                parts.projector.register_forward_pre_hook(self._projector, with_kwargs=True)
            )
        for number in layers:
            if number == len(parts.layers):
                # the input of a layer that does not exist: before the final norm
                self.hooks.append(parts.layers[-1].register_forward_hook(self._last))
            else:
                self.numbers[parts.layers[number]] = number
                self.hooks.append(
                    parts.layers[number].register_forward_pre_hook(self._layer, with_kwargs=True)
                )
        self.depth = len(parts.layers)

    def remove(self) -> None:
        """Take all hooks off, and let go of what an interrupted forward has left."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self._drop()

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _untraced(self._begin, module, args, kwargs)

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _untraced(self._end, output)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "model: nn.DataParallel is not supported (its replicas share the hooks); use DDP or FSDP"
            )
        self._drop()  # no hook is called after a KeyboardInterrupt
        self.inside = True
        inputs = (
            dict(zip(inspect.signature(module.forward).parameters, args, strict=False))
            if args
            else {}
        )
        inputs.update(kwargs)
        if self.start(module, inputs):
            self.seen = Seen(inputs, self.parts)
            if self.merge is not None:
                self.merge.open()

    def _end(self, output: Any) -> Any:
        seen = self._drop()
        if output is None:  # the forward raised
            return None
        if seen is None:
            self.skipped(output)
            return None
        return self.finish(output, seen)

    def _drop(self) -> Seen | None:
        """End the forward; what it has captured."""
        seen, self.seen, self.inside = self.seen, None, False
        if self.merge is not None:
            self.merge.close()
        return seen

    def _text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen is None:
            if not self.inside:
                self.missed(module)
        elif self.seen.embeds is None:
            self.seen.embeds = kwargs.get("inputs_embeds")

    def _first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen is not None and self.seen.first is None:
            self.seen.first = _hidden(args, kwargs)

    def _projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen is not None:  # it may be called for the images and again for the videos
            self.seen.projector.append(_hidden(args, kwargs))

    def _layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen is not None:
            self._keep(self.numbers[module], _hidden(args, kwargs))

    def _last(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._keep(self.depth, output[0] if isinstance(output, tuple) else output)

    def _keep(self, number: int, hidden: Tensor) -> None:
        if self.seen is None or number in self.seen.hidden:
            return
        self.seen.hidden[number] = hidden
        device = hidden.device.type
        self.seen.autocast[number] = (
            device,
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
        )


def like(layer: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device that the layer's hidden states have."""
    # adapters have a dtype of their own (PEFT's are float32 over a quantised layer)
    adapters = {
        id(p)
        for module in layer.modules()
        for name in getattr(module, "adapter_layer_names", ())
        for p in getattr(getattr(module, name, None), "parameters", tuple)()
    }
    # quantised weights are integers or one byte wide; the norms beside them are not
    for module in layer.modules():
        for parameter in module.parameters(recurse=False):
            if (
                parameter.is_floating_point()
                and parameter.element_size() > 1
                and id(parameter) not in adapters
            ):
                # accelerate brings offloaded weights from "meta" to where they are used
                used = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
                device = (
                    parameter.device
                    if used is None or not parameter.is_meta
                    else torch.device(used)
                )
                return parameter.dtype, device
    raise ValueError(
        f"model: {type(layer).__name__} has no floating point parameters to take a dtype from"
    )


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_untraced = _call  # what torch.compile leaves alone: traced, the ends of a forward would cost a dozen graphs


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if not args and "hidden_states" not in kwargs:
        raise RuntimeError(
            "layers: a decoder layer or projector was called without its hidden states as the first positional "
            f"argument or as hidden_states; it got {', '.join(kwargs) or 'nothing'}"
        )
    return args[0] if args else kwargs["hidden_states"]
