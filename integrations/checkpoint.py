"""Save and load the head: a safetensors file and a small JSON file beside it. Nothing is ever
unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pre_kernels import __version__

from .averaging import Average
from .distributed import FullParameters, raise_on_every_rank, rank, unwrapped

WEIGHTS = "pre_head.safetensors"
CONFIG = "pre_head.json"
# With these begin the names of all files that `save` writes, also while it is at work.
OF_HEAD = "pre_head."
FORMAT = 1
# Settings that were added without a new format number, so older files lack them.
MAY_BE_ABSENT = ("weighting",)
# The head of a file without these settings.
FORMER_HEAD = {"anchor_norm": "none", "depth": 2}


def save(
    head: nn.Module,
    settings: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    attached: nn.Module,
    wrapper: nn.Module | None = None,
    writes: bool | None = None,
    averages: Sequence[Average] = (),
) -> None:
    """Write `head` to `directory`, which is created if needed. Each file is replaced as a whole or
    not at all. See `PreHandle.save`.

    Args:
        head: a `PreHead`, or a ModuleList of them. PEFT may have wrapped it.
        settings: the settings that the head was made for; they are written to the JSON file.
        attached: the module that has the head as a child.
        wrapper: the wrapper around that module. FSDP1 needs it to gather the parameters it split.
        writes: whether this process writes. None: rank 0 does.
        averages: the moving averages of anchors, which are written with it.
    """
    trained = _trained(head)
    full = FullParameters(trained, _shapes(trained), wrapper, attached)
    if writes is None:
        writes = rank() == 0
    with raise_on_every_rank(full.collective):
        if writes:
            os.makedirs(directory, exist_ok=True)
    if not (writes or full.collective):
        return
    tensors = full.read(keep=writes)
    with raise_on_every_rank(full.collective):
        if writes:
            config = {"format": FORMAT, "pre_kernels": __version__, **describe(head, settings)}
            means = {n: p.to("cpu").contiguous() for n, p in _averaged(averages).items()}
            _write(directory, tensors | means, config)


def load(
    head: nn.Module,
    settings: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    attached: nn.Module,
    wrapper: nn.Module | None = None,
    averages: Sequence[Average] = (),
) -> None:
    """Copy the head in `directory` into `head`, cast to the dtype of `head`. The arguments are
    those of `save`. See `PreHandle.load`.

    Raises:
        FileNotFoundError: if the folder, or everything of a head in it, is missing.
        ValueError: if a file is not valid, only a part of a head is there, or the saved head
            differs from `head`.
    """
    trained = _trained(head)
    shapes = _shapes(trained)
    full = FullParameters(trained, shapes, wrapper, attached)
    means = _averaged(averages)
    every = shapes | {name: tuple(mean.shape) for name, mean in means.items()}
    with raise_on_every_rank(full.collective):
        tensors = _read(directory, describe(head, settings), every)
    for name, mean in means.items():
        mean.copy_(tensors.pop(name))
    full.write(tensors)


def _averaged(averages: Sequence[Average]) -> dict[str, Tensor]:
    """The parameters of moving averages, by their names in the file."""
    return {
        f"anchor.{i}.{name}": parameter
        for i, average in enumerate(averages)
        for name, parameter in average.update().named_parameters()
    }


def describe(head: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in which a head on disk and a head in a model must agree."""
    first = next(iter(_heads(_trained(head)).values()))
    return {
        **settings,
        "dim": first.dim,
        "hidden_dim": first.hidden_dim,
        "out_dim": first.out_dim,
        "bias": first.b1 is not None,
        "activation": first.activation,
        "loss": first.loss,
        "depth": first.depth,
        "norm": first.norm,
    }


def _trained(head: Any) -> nn.Module:
    """The head that is trained. PEFT's modules_to_save wraps the head and trains a copy of it."""
    trained: nn.Module = head
    if hasattr(head, "modules_to_save"):
        trained = head.modules_to_save[head.active_adapters[0]]
    return trained


def _heads(trained: nn.Module) -> dict[str, Any]:
    """Every `PreHead`, by the prefix of its parameter names."""
    head = unwrapped(trained)
    if isinstance(head, nn.ModuleList):
        return {f"{i}.": unwrapped(layer_head) for i, layer_head in enumerate(head)}
    return {"": head}


def _shapes(trained: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the full parameters by name, whether or not they are split."""
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, head in _heads(trained).items():
        shapes |= {prefix + name: shape for name, shape in head.shapes.items()}
    return shapes


def _write(
    directory: str | os.PathLike[str], tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    from safetensors.torch import save_file

    weights_path = os.path.join(directory, WEIGHTS)
    config_path = os.path.join(directory, CONFIG)
    metadata = {"format": "pt", "config": json.dumps(config)}
    save_file(tensors, weights_path + ".part", metadata)
    with open(config_path + ".part", "w") as file:
        json.dump(config, file, indent=2)
        file.write("\n")
    # safetensors makes a file that its owner alone can read. Some file systems have no modes.
    with contextlib.suppress(OSError):
        shutil.copymode(config_path + ".part", weights_path + ".part")
    os.replace(weights_path + ".part", weights_path)
    os.replace(config_path + ".part", config_path)


def _read(
    directory: str | os.PathLike[str],
    described: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """The tensors in `directory`, after a check that they are those of a head with this description
    and these shapes."""
    if not os.path.isdir(directory):
        raise FileNotFoundError(
            f"directory: {os.fspath(directory)!r} is not a directory; want one that handle.save() "
            "wrote"
        )
    paths = {name: os.path.join(directory, name) for name in (CONFIG, WEIGHTS)}
    missing = [path for path in paths.values() if not os.path.isfile(path)]
    if missing:
        # A process that is killed inside `save` leaves some of these.
        parts = sorted(name for name in os.listdir(directory) if name.startswith(OF_HEAD))
        if parts:
            raise ValueError(
                f"directory: {missing[0]!r} is missing, got {', '.join(parts)} of a save that was "
                f"interrupted; want both {CONFIG} and {WEIGHTS}, load an earlier checkpoint"
            )
        raise FileNotFoundError(
            f"directory: {missing[0]!r} is missing; want both {CONFIG} and {WEIGHTS}"
        )

    config = _read_config(paths[CONFIG])
    for name, wanted in described.items():
        if name in MAY_BE_ABSENT and name not in config:
            continue
        saved = config.get(name, FORMER_HEAD.get(name))
        if saved != wanted:
            raise ValueError(
                f"{name}: {paths[CONFIG]!r} says {saved!r}, this handle has {wanted!r}; "
                "call apply_pre with the settings of the saved head, on a model of its width"
            )

    tensors, written = _read_weights(paths[WEIGHTS])
    where = f"{paths[WEIGHTS]!r}"
    if tensors.keys() != shapes.keys():
        raise ValueError(
            f"{where}: holds {sorted(tensors)}, this head has {sorted(shapes)}; both files must be "
            "of one handle.save()"
        )
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{where}: `{name}` has shape {tuple(tensor.shape)}, this head's {shapes[name]}; "
                "both files must be of one handle.save()"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: `{name}` has dtype {tensor.dtype}, want floating point")
    # A process that is killed while it saves over another head leaves files of two heads.
    others = {} if written is None else json.loads(written)
    for name in described.keys() & config.keys() & others.keys():
        if others[name] != config[name]:
            raise ValueError(
                f"{where}: was written with {name} {others[name]!r}, {CONFIG} beside it says "
                f"{config[name]!r}; both files must be of one handle.save(), load an earlier "
                "checkpoint"
            )
    return tensors


def _read_config(path: str) -> dict[str, Any]:
    try:
        with open(path) as file:
            config = json.load(file)
    except ValueError as error:  # JSON and Unicode errors are both subclasses
        raise ValueError(
            f"{path!r}: not valid JSON: {error}; copy the file again, or load another checkpoint"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path!r}: format {got!r}, want {FORMAT}; {_remedy(config)}")
    return config


def _remedy(config: Any) -> str:
    """What to do about a file of another format."""
    number = config.get("format") if isinstance(config, dict) else None
    if isinstance(number, int) and number > FORMAT:
        return f"a newer version of pre-kernels ({config.get('pre_kernels')}) wrote it, upgrade"
    return "handle.save() did not write it; copy the file again, or load another checkpoint"


def _read_weights(path: str) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and the content of the JSON file that was written with them; None if the file is
    of a version that did not write it there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get("config")
    except SafetensorError as error:
        raise ValueError(
            f"{path!r}: not a valid safetensors file: {error}; copy the file again, or load "
            "another checkpoint"
        ) from error
