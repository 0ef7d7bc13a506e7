"""Training on several processes: counts over a group, heads whose parameters are split, and errors
that are raised on every process."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Each wrapper around a head adds one of these to the names of its parameters.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
# Classes that wrap or shard a model and must come after apply_pre. They are compared by name, so
# that none of their packages has to be imported.
WRAPPERS_AFTER = (
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
)


SUM = "a sum over the processes, such as the number of visual tokens,"


class Group:
    """A process group over which the terms of a forward are counted.

    Args:
        group: a ProcessGroup, or "world". "world" is a single process if torch.distributed is not
            initialised.

    Raises:
        TypeError: for any other value.
    """

    def __init__(self, group: Any) -> None:
        if group != "world" and not (
            torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)
        ):
            raise TypeError(
                f"group: got {group!r}, want a ProcessGroup that this process is in, "
                '"world", or None'
            )
        self.group = None if group == "world" else group

    def __deepcopy__(self, memo: Any) -> Group:
        return copy.copy(self)  # a process group cannot be copied

    def mean(self, value: Tensor) -> Tensor:
        """The mean of `value` over the processes, in float32 on its own device. Collective; does
        not wait for the device."""
        value = value.detach().float()
        if not initialized():
            return value.clone()
        return Sum(value, self.group).wait() / torch.distributed.get_world_size(self.group)

    def divisor(self, count: Tensor) -> Tensor:
        """The number by which each process divides its Σℓ, so that gradients averaged over the
        processes are those of the mean over all terms."""
        mean = self.mean(count)  # 0 if no process has a term
        return torch.where(mean > 0, mean, 1.0)


class Sum:
    """The sum of `value` over the processes of `group`, on its own device. Making it is collective,
    but waits for nothing, neither on the host nor on the device.

    Args:
        alone: whether this process trains alone, though there may be others.
    """

    def __init__(self, value: Tensor, group: Any = None, alone: bool = False) -> None:
        self._sum = value.detach().clone()
        self._work: Any = None
        if initialized() and not alone:
            with named_failure(SUM):
                self._work = torch.distributed.all_reduce(self._sum, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The sum. On a GPU the device waits for it, the host does not.

        Raises:
            RuntimeError: if another process died, or did not take part within the group's timeout.
        """
        if self._work is not None:
            with named_failure(SUM):
                self._work.wait()
            self._work = None
        return self._sum


@contextlib.contextmanager
def named_failure(what: str) -> Iterator[None]:
    """Name the collective that failed. The backend names only the time or the connection."""
    try:
        yield
    except torch.AcceleratorError:  # an earlier kernel's, of whichever code
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"PRe: {what} failed, because another process died, is stuck, or does not take part "
            "(each has to call the model equally often, with PRe on); look at the first error of "
            "the other processes. How long to wait is the timeout of the process group "
            f"(ddp_timeout of TrainingArguments): {error}"
        ) from error


def check_not_wrapped(model: nn.Module) -> None:
    """Raise a TypeError if the model is compiled as a whole, or if it or a part of it is wrapped or
    sharded."""
    if _is(model, "OptimizedModule"):
        raise TypeError(
            "model: got OptimizedModule, which torch.compile made; want the plain model: call "
            "apply_pre first, then torch.compile"
        )
    for module in model.modules():
        wrappers = {c.__name__ for c in type(module).__mro__} & set(WRAPPERS_AFTER)
        if wrappers:
            raise TypeError(
                f"model: got {type(model).__name__} with {wrappers.pop()} around or inside; want "
                "the plain model: call apply_pre first, then wrap or shard it, so that the head is "
                "averaged and sharded with the rest"
            )


def rank() -> int:
    """The rank of this process; 0 without torch.distributed."""
    return torch.distributed.get_rank() if initialized() else 0


def sharing_a_sequence() -> int:
    """The number of processes that share each sequence by DeepSpeed's sequence parallelism; 1
    without it."""
    comm = getattr(sys.modules.get("deepspeed"), "comm", None)
    if comm is None or not comm.is_initialized():
        return 1
    from deepspeed.utils import groups

    return int(groups._get_sequence_parallel_world_size())


def check_no_context_parallelism() -> None:
    """Raise a ValueError if accelerate is set up for context parallelism in a Trainer."""
    from accelerate.state import AcceleratorState

    config = AcceleratorState._shared_state.get("parallelism_config")
    size = getattr(config, "cp_size", 1)
    if size > 1:
        raise ValueError(
            f"parallelism_config: got cp_size={size}, want 1: the Trainer cuts input_ids among the "
            "processes but not the images, so the model cannot merge them, and visual tokens are "
            "counted on every process; call handle.remove() before, or use another strategy for "
            "long sequences"
        )


@contextlib.contextmanager
def raise_on_every_rank(collective: bool) -> Iterator[None]:
    """Raise an exception from inside the block on every process, so that none waits for the others
    forever.

    Args:
        collective: whether all processes enter the block. If not, only this one raises.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors: list[Any] = [error]
    if collective and initialized():
        errors *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, error)
    first = error or next((e for e in errors if e is not None), None)
    if first is not None:
        raise first


def unwrapped(module: nn.Module) -> Any:
    """The module inside wrappers of FSDP1, torch.compile and activation checkpointing."""
    while True:
        inner = next((module._modules[name] for name in WRAPPERS if name in module._modules), None)
        if inner is None:
            return module
        module = inner


class FullParameters:
    """Reads and writes the full parameters of a head that FSDP1, FSDP2 or ZeRO-3 may have split
    over the processes.

    Args:
        head: the module that owns the parameters.
        shapes: the shapes of the full parameters by name.
        model: the module that the training calls. FSDP1 needs it to gather the parameters it split.
        attached: the module that has `head` as a child.

    Attributes:
        collective: whether the parameters are split, so that every process has to take part in
            `read` and `write`.

    Raises:
        RuntimeError: if the parameters are split in an unknown way.
    """

    def __init__(
        self,
        head: nn.Module,
        shapes: dict[str, tuple[int, ...]],
        model: nn.Module | None,
        attached: nn.Module,
    ) -> None:
        for module in (attached, *head.modules()):
            if _is(module, "FSDPModule"):
                # After a forward without a backward the parameters are still gathered.
                module.reshard()  # type: ignore[operator]
        self.head = head
        self.parameters = {_clean(name): p for name, p in head.named_parameters()}
        self.units = [] if model is None else _units(model, head)
        self.zero = [p for p in self.parameters.values() if hasattr(p, "ds_id")]
        self.fsdp2 = {name for name, p in self.parameters.items() if hasattr(p, "full_tensor")}
        self.collective = bool(self.units or self.zero or self.fsdp2)
        if not self.collective:
            self._check_whole(shapes)

    def read(self, keep: bool = True) -> dict[str, Tensor]:
        """Copies of the full parameters on the CPU by name. Empty if `keep` is False: a process
        that writes no file still takes part in gathering."""
        with self._gathered(write=False) as named:
            full = {
                name: _full(p) if name in self.fsdp2 else p.detach() for name, p in named.items()
            }
            if not keep:
                return {}
            return {name: p.to("cpu", copy=True).contiguous() for name, p in full.items()}

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        """Copy `values`, which are the same on every process, into the parameters and into the
        float32 copies that DeepSpeed keeps."""
        with self._gathered(write=True) as named:
            for name, p in named.items():
                if name in self.fsdp2:
                    _distribute(values[name], p)
                else:
                    p.copy_(values[name])
        for name, p in self.parameters.items():
            if hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping"):
                from deepspeed.utils import safe_set_full_fp32_param

                safe_set_full_fp32_param(p, values[name].float())

    def _check_whole(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            parameter = self.parameters.get(name)
            if parameter is None:
                has = "no parameter of that name"
            elif parameter.shape != shape:
                has = f"shape {tuple(parameter.shape)}"
            else:
                continue
            raise RuntimeError(
                f"head: `{name}` is sharded ({has}, whole {shape}); under FSDP1 pass its wrapper "
                "as model= (with use_orig_params=True), under another library gather the "
                "parameters first"
            )

    @contextlib.contextmanager
    def _gathered(self, write: bool) -> Iterator[dict[str, nn.Parameter]]:
        """The parameters by name; full ones, except under FSDP2."""
        with contextlib.ExitStack() as stack:
            if self.units:
                from torch.distributed.fsdp import FullyShardedDataParallel

                for unit in self.units:
                    stack.enter_context(
                        FullyShardedDataParallel.summon_full_params(
                            unit, recurse=False, writeback=write
                        )
                    )
            if self.zero:
                import deepspeed

                stack.enter_context(
                    deepspeed.zero.GatheredParameters(self.zero, modifier_rank=0 if write else None)
                )
            yield {_clean(name): p for name, p in self.head.named_parameters()}


def initialized() -> bool:
    """Whether torch.distributed is available and initialised."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is(module: nn.Module, name: str) -> bool:
    return any(c.__name__ == name for c in type(module).__mro__)


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _units(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The FSDP1 modules around `head`: the outermost, which must be initialised first, and the
    innermost."""
    around = [
        m for m in model.modules() if _is(m, "FullyShardedDataParallel") and head in m.modules()
    ]
    return list(dict.fromkeys([*around[:1], *around[-1:]]))


def _full(parameter: Any) -> Tensor:
    full: Tensor = parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
    return full


def _distribute(value: Tensor, parameter: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    own_part = parameter.to_local()
    value = value.to(parameter.device_mesh.device_type, parameter.dtype)
    # src_data_rank=None: every process has the full value and takes its part of it, so no process
    # has to send data.
    own_part.copy_(
        distribute_tensor(
            value, parameter.device_mesh, parameter.placements, src_data_rank=None
        ).to_local()
    )
