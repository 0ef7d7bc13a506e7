"""Reader: read the hidden states of a model's visual tokens, layer by layer, for the
diagnostics."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, CapturedForward
from .families import check_tokens, find_parts
from .image_rules import states_as_is
from .tokens import find_tokens

# Names of the norm before the unembedding, in various models.
NORMS = ("norm", "final_layernorm", "ln_f", "final_norm", "embedding_norm")


@dataclass(frozen=True)
class ImageStates:
    """The states of one image's visual tokens, each tensor (patches, width).

    Attributes:
        hidden: the states by layer number; 0 is the input of the decoder.
        anchor: the input of the decoder, whether or not layer 0 is read.
        sample: the image's row of the batch.
    """

    hidden: dict[int, Tensor]
    anchor: Tensor
    sample: int


class Reader:
    """Reads the hidden states of `model`'s visual tokens. A context manager that removes its hooks
    at the end.

    ```python
    with Reader(model, layers=(0, 16, 32)) as reader:
        for image in reader.read(inputs):
            print(image.hidden[16].shape)  # (patches, width)
    ```

    It also works on a model that PRe is attached to, and on the model inside a trainer's wrapper.

    Args:
        model: a Hugging Face vision-language model, or a `PeftModel` around one.
        layers: numbers in 0..L. Number l is the output of decoder layer l (L: before the final
            norm), and 0 the input of the decoder. None reads all of them.
        mask_fn, text_model, decoder_layers: like `mask_fn`, `text_model` and `layers` of
            `apply_pre`.

    Raises:
        ValueError, TypeError: with the argument, the value it got and the value it needs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        *,
        mask_fn: Callable[[dict[str, Any]], Tensor] | None = None,
        text_model: str | nn.Module | None = None,
        decoder_layers: str | nn.ModuleList | Sequence[nn.Module | str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
        unwrap: Any = getattr(model, "get_base_model", None)  # PEFT's
        inner = model if unwrap is None else unwrap()
        self.parts = find_parts(inner, text_model, decoder_layers)
        if mask_fn is not None:
            self.parts.merge = None
        else:
            check_tokens(self.parts, inner)
        self.model = model
        self.inner = inner
        self.mask_fn = mask_fn
        self.depth = self.parts.depth
        self.layers = _numbers(layers, self.depth)
        self._reading = False
        self._seen: CapturedForward | None = None
        inside = tuple(number for number in self.layers if number > 0)
        self._capture = Capture(model, self.parts, inside, lambda *_: self._reading, self._finish)

    @torch.no_grad()
    def read(
        self, inputs: Mapping[str, Any], call: Callable[..., Any] | None = None
    ) -> list[ImageStates]:
        """The images of one forward with these arguments, in eval mode and without gradients, in
        the order of the batch.

        An image is the same as at `apply_pre`'s level "image". The tensors are in the dtype and on
        the device of the forward.

        Args:
            inputs: the forward's arguments by name, on the model's device.
            call: a wrapper around the model (DDP, FSDP, DeepSpeed) to call instead of the model.

        Raises:
            ValueError: if the forward has no visual tokens, or its images cannot be told apart.
            RuntimeError: if `call` does not call the model.
        """
        return self.read_with_output(inputs, call)[0]

    @torch.no_grad()
    def read_with_output(
        self, inputs: Mapping[str, Any], call: Callable[..., Any] | None = None
    ) -> tuple[list[ImageStates], Any]:
        """The same as `read`, and the output of the model."""
        self._reading = True
        try:
            with evaluating(self.model):
                output = (call or self.model)(**inputs)
            seen = self._seen
        finally:
            self._reading = False
            self._seen = None
        if seen is None:
            raise RuntimeError(
                f"call: it never called the {type(self.model).__name__} that is read"
            )
        visual = find_tokens(self.parts, seen.inputs, self.mask_fn)
        if visual is None or not visual.mask.any():
            raise ValueError("inputs: got no visual tokens, want at least one image")
        states = {
            0: seen.anchor(),
            **{number: seen.layer(number) for number in self.layers if number},
        }
        visual.check(states[0])
        numbers = visual.images(self.parts, seen.inputs)
        samples = visual.mask.nonzero()[:, 0]
        selected = {layer: state[visual.mask.to(state.device)] for layer, state in states.items()}
        images = []
        for number in numbers.unique():
            of_image = numbers == number
            rows = {layer: state[of_image.to(state.device)] for layer, state in selected.items()}
            sample = int(samples[of_image.to(samples.device)][0])
            images.append(
                ImageStates({layer: rows[layer] for layer in self.layers}, rows[0], sample)
            )
        return images, output

    def logits(self) -> Callable[[Tensor], Tensor] | None:
        """The function unembedding(final norm(h)) for the logit lens, (n, width) → (n, vocabulary).
        None if the norm or the unembedding is not found."""
        text: Any = self.parts.text
        norm = next(
            (m for name in NORMS if isinstance(m := getattr(text, name, None), nn.Module)), None
        )
        get: Any = getattr(self.inner, "get_output_embeddings", None)
        head = None if get is None else get()
        # Models with several streams of states (AltUp) merge them before the final norm, which this
        # function does not do.
        several = self.parts.family.hidden is not states_as_is
        if norm is None or head is None or several:
            return None
        weight = head.weight
        return lambda h: head(norm(h.to(weight.device, weight.dtype)))

    def remove(self) -> None:
        """Remove the hooks. Calling this twice is fine."""
        self._capture.remove()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _finish(self, output: Any, seen: CapturedForward) -> Any:
        self._seen = seen
        return output


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context manager that puts `model` into eval mode. At the end every module gets its own mode
    back, because users may keep some modules in eval mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _numbers(layers: Any, depth: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(depth + 1))
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise TypeError(
            f"layers: got {layers!r}, want a sequence of integers in 0..{depth}, or None for all"
        )
    numbers = []
    for entry in layers:
        try:
            number = operator.index(entry)
        except TypeError:
            raise TypeError(
                f"layers: got {entry!r} among them, want integers in 0..{depth}"
            ) from None
        if isinstance(entry, bool) or not 0 <= number <= depth:
            raise ValueError(f"layers: got {entry!r} among them, want integers in 0..{depth}")
        numbers.append(number)
    return tuple(sorted(set(numbers)))
