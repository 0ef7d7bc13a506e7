"""The only hook mechanism: it collects references to tensors inside a forward of the whole model,
and uses them when the forward ends.

The hooks are bound methods of a plain object, so `copy.deepcopy(model)` copies them with the model.
No layer hook computes anything: under checkpointing the gradient would be lost there, or the work
done twice. Checkpointing may also fire a hook again when it recomputes. The first capture of a
forward is therefore the one that is kept, and the end of the outer call disarms the hooks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .families import Parts


@dataclass
class CapturedForward:
    """References from one forward: its arguments by name, and the tensors that the hooks saw.

    Attributes:
        inputs: the forward's arguments by name.
        parts: the parts of the model.
        hidden: the output of l decoder layers by l, as the layers pass it on.
        embeds: the embeddings passed to the text model, if any.
        first: the input of the first decoder layer.
        projector: the input of the projector in each of its calls.
        autocast: for each layer number the device type, whether autocast was on, and its dtype.
    """

    inputs: dict[str, Any]
    parts: Parts
    hidden: dict[int, Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None
    first: Tensor | None = None
    projector: list[Tensor] = field(default_factory=list)
    autocast: dict[int, tuple[str, bool, torch.dtype]] = field(default_factory=dict)

    def anchor(self) -> Tensor:
        """The embeddings (B, T, d) that enter the text model, or its first layer if the text model
        merges text and images itself.

        Raises:
            RuntimeError: if neither ran.
        """
        embeddings = self.embeds if self.embeds is not None else self.first
        if embeddings is None:
            raise RuntimeError(
                "anchor: neither the text model nor its first layer ran in this forward; attach to "
                "the model that is called, or name the decoder that runs: apply_pre(text_model=...)"
            )
        return embeddings

    def layer(self, number: int) -> Tensor:
        """The output (B, T, d) of decoder layer `number`, counted from 1.

        Raises:
            RuntimeError: if the layer did not run.
        """
        if number not in self.hidden and self.first is None:
            name = type(self.parts.layers[0]).__name__
            raise RuntimeError(
                f"layers: got decoder layers ({name}) that this forward did not call, want modules "
                "that it calls with the hidden states; a model that computes its layers from their "
                "parts, such as SmolVLA and pi0, calls at least their norms: "
                "apply_pre(layers=[*(layer.input_layernorm for layer in text.layers), text.norm])"
            )
        if number not in self.hidden:
            raise RuntimeError(
                f"layer: decoder layer {number} did not run in this forward, as after an early "
                "exit; choose one that always runs: apply_pre(layer=...)"
            )
        return self.parts.family.hidden(self.hidden[number], self.parts.config)

    def autocast_of(self, number: int) -> torch.autocast:
        """The autocast state in which decoder layer `number` ran. Wrappers autocast only the
        forward, and the captured tensors are used after it."""
        device, enabled, dtype = self.autocast[number]
        if not enabled:
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, dtype=dtype, enabled=True)


def _nothing(_: Any) -> None:
    pass


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@functools.cache
def _untraced() -> Callable[..., Any]:
    """`_call`, excluded from torch.compile. Tracing the start and end of a forward would split it
    into a dozen graphs. Made on first use, because making it imports the compiler."""
    untraced: Callable[..., Any] = torch.compiler.disable(_call)
    return untraced


class Capture:
    """Hooks on `outer` and its `parts`. `remove()` removes them.

    Args:
        outer: the module whose call counts as "the forward".
        parts: the parts of that module.
        layers: numbers in 1..L; number l captures the output of decoder layer l.
        start: gets the module that is called (a compiler may have replaced `outer` by another
            module that has its hooks) and the forward's arguments by name; returns whether to
            capture.
        finish: gets the forward's output and the capture, and returns the output.
        missed: gets the text model when that runs outside a call of `outer`.
        skipped: gets the output of a forward that was not captured.
    """

    def __init__(
        self,
        outer: nn.Module,
        parts: Parts,
        layers: tuple[int, ...],
        start: Callable[[nn.Module, dict[str, Any]], bool],
        finish: Callable[[Any, CapturedForward], Any],
        missed: Callable[[nn.Module], None] = _nothing,
        skipped: Callable[[Any], None] = _nothing,
    ) -> None:
        self.start = start
        self.finish = finish
        self.missed = missed
        self.skipped = skipped
        self.parts = parts
        self.seen: CapturedForward | None = None
        self.inside = False
        self.merge = parts.merge
        self.untraced = _untraced()
        self.numbers: dict[nn.Module, int] = {}
        self.hooks = [
            # prepend: it must run before foreign hooks, which may replace input_ids by embeddings.
            outer.register_forward_pre_hook(self._open, with_kwargs=True, prepend=True),
            # always_call: a forward that raises must also release its activations.
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
                # No layer follows, so the last layer's output is captured instead of an input.
                self.hooks.append(parts.layers[-1].register_forward_hook(self._last))
            else:
                self.numbers[parts.layers[number]] = number
                self.hooks.append(
                    parts.layers[number].register_forward_pre_hook(self._layer, with_kwargs=True)
                )
        self.depth = len(parts.layers)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the function that the compiler made, which cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "untraced"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.untraced = _untraced()

    def remove(self) -> None:
        """Remove all hooks, and release the capture of an interrupted forward."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self._drop()

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.untraced(self._begin, module, args, kwargs)

    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.untraced(self._end, output)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "model: nn.DataParallel is not supported (its replicas share the hooks); use DDP "
                "or FSDP"
            )
        # After a KeyboardInterrupt the end of the previous forward has not run.
        self._drop()
        self.inside = True
        inputs: dict[str, Any] = {}
        if args:
            names = inspect.signature(module.forward).parameters
            inputs.update(zip(names, args, strict=False))
        inputs.update(kwargs)
        if self.start(module, inputs):
            if torch.compiler.is_exporting():
                raise RuntimeError(
                    "model: torch.export, which torch.distributed.pipelining.pipeline also uses, "
                    "got a forward in training with PRe, want one without it, because an exported "
                    "model has no hooks; call handle.remove() first"
                )
            self.seen = CapturedForward(inputs, self.parts)
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

    def _drop(self) -> CapturedForward | None:
        """End the forward and return its capture."""
        seen = self.seen
        self.seen = None
        self.inside = False
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
        if self.seen is not None:
            # The projector may be called once for the images and again for the videos.
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


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if not args and "hidden_states" not in kwargs:
        raise RuntimeError(
            "layers: a decoder layer or projector was called without its hidden states as the "
            "first positional argument or as hidden_states; it got "
            f"{', '.join(kwargs) or 'nothing'}"
        )
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
