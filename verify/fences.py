"""Watches memory in tests: fences of poison around tensors, a check of the interpreter's loads and
stores, and addresses without memory."""

from __future__ import annotations

import contextlib
import math
import mmap
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from pre_kernels.fused import ops
from pre_kernels.fused.kernels import matmul

# the class of compiled kernels, or that of interpreted ones
KERNEL = type(matmul.matmul_kernel)
INTERPRETED = KERNEL is interpreter.InterpretedFunction
MARGIN = 4096  # bytes


def poison(dtype: torch.dtype):
    """A value that no result may contain: NaN, True, or an index far out of range."""
    return float("nan") if dtype.is_floating_point else True if dtype == torch.bool else 2**30


class Fenced:
    """Puts tensors into larger buffers that are filled with poison: in the margins, and in the gaps
    of a strided tensor."""

    def __init__(self) -> None:
        self.watched: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def _place(
        self, like: torch.Tensor, fill: bool, constant: bool, live: int | None = None
    ) -> torch.Tensor:
        margin = MARGIN // like.element_size()
        span = (
            1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
            if like.numel()
            else 0
        )
        small = like.dtype == torch.float8_e4m3fn  # torch cannot fill float8
        buffer = torch.full(
            (span + 2 * margin,), 0x7F if small else poison(like.dtype), device=like.device
        )
        buffer = buffer.to(torch.uint8).view(like.dtype) if small else buffer.to(like.dtype)
        inner = buffer.as_strided(like.shape, like.stride(), margin)
        if fill:
            inner[:live].copy_(like[:live]) if inner.dim() else inner.copy_(like)
        watched = torch.ones(buffer.shape, dtype=torch.bool, device=like.device)
        if not constant:
            watched.as_strided(like.shape, like.stride(), margin).fill_(False)
        self.watched.append((buffer, watched, self._bytes(buffer).clone()))
        return inner

    @staticmethod
    def _bytes(buffer: torch.Tensor) -> torch.Tensor:
        return buffer.view(torch.uint8).view(buffer.shape[0], -1)

    def __call__(self, tensor, live=None):
        """An input that must not change. Its rows from `live` on are poison."""
        return self._place(tensor, fill=True, constant=True, live=live)

    def both(self, tensor, live=None):
        """An input that may be overwritten."""
        return self._place(tensor, fill=True, constant=False, live=live)

    def out(self, *shape, dtype=torch.float32, device=None):
        return self._place(
            torch.empty(shape, dtype=dtype, device=device), fill=False, constant=False
        )

    def check(self) -> None:
        for buffer, watched, before in self.watched:
            assert torch.equal(self._bytes(buffer)[watched], before[watched])


class Unfenced:
    """Like `Fenced`, but without fences and poison: outputs begin as 0.5."""

    def __call__(self, tensor, live=None):
        return tensor

    def both(self, tensor, live=None):
        return tensor.clone()

    def out(self, *shape, dtype=torch.float32, device=None):
        return torch.full(shape, 0.5, device=device).to(dtype)


class FencedAllocations(TorchDispatchMode):
    """Puts fences around every tensor that is allocated inside it, and poison into empty ones."""

    def __init__(self, place) -> None:
        super().__init__()
        self.place = place

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pre_kernels":
            real, _ = ops.OPERATORS[function._schema.name.split("::")[1]]
            with self:
                return real(*args)
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if (
            name in ("empty", "new_empty", "empty_like", "new_full", "new_ones", "new_zeros")
            and result.numel()
        ):
            result = self.place(result, fill="empty" not in name, constant=False)
        return result


class WatchedMemory:
    """Checks the interpreter's loads and stores. `far`: (begin, end) of addresses without memory:
    they read as zeros, and what is stored there is dropped."""

    def __init__(self, far=()) -> None:
        self.real = interpreter._interpreter
        self.far = far
        self.names = set()
        self.reached = {}

    def __getattr__(self, name):
        return getattr(self.real, name)

    def load(self, pointers, mask, other, dtype):
        away = self._touch(pointers, mask, self.loads)
        found = self.real.load(pointers, mask & ~away, other, dtype)
        return np.where(mask & away, np.zeros((), dtype), found) if away.any() else found

    def store(self, pointers, value, mask):
        return self.real.store(pointers, value, mask & ~self._touch(pointers, mask, self.stores))

    def _touch(self, pointers, mask, seen):
        touched = np.unique(pointers[mask])
        where = np.searchsorted(self.begins, touched, "right") - 1
        inside = (where >= 0) & (touched < self.ends[where])
        assert inside.all(), f"{self.name}: {touched[~inside][:4]} lie in no tensor of the launch"
        gaps = (touched - self.begins[where]) % self.strides[where] >= self.widths[where]
        assert not gaps.any(), f"{self.name}: {touched[gaps][:4]} lie between the rows of a tensor"
        seen.append((touched, interpreter.interpreter_builder.grid_idx))
        away = np.zeros(np.shape(pointers), bool)
        for begin, end in self.far:
            here = (pointers >= begin) & (pointers < end)
            if (here & mask).any():
                self.reached[begin] = max(
                    self.reached.get(begin, 0), int(pointers[here & mask].max())
                )
            away |= here
        return away

    def run(self, kernel, *args, grid, warmup, **kwargs):
        self.name = kernel.__name__
        self.loads = []
        self.stores = []
        self.names.add(self.name)
        tensors = [x.base if isinstance(x, TensorDescriptor) else x for x in args]
        spans = sorted(span(x) for x in tensors if isinstance(x, torch.Tensor) and x.numel())
        self.begins, self.ends, self.strides, self.widths = np.array(spans, np.uint64).T
        grid = (*grid, 1, 1)[:3]
        self.execute(kernel, grid, args, kwargs)
        self.check_programs_are_apart()

    def execute(self, kernel, grid, args, kwargs):
        interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, grid)(*args, **kwargs)

    def check_programs_are_apart(self):
        """No two programs store to one address, and none loads what another one stores. So the
        result does not depend on the order in which programs run, or in which a GPU adds."""

        def pairs(seen):
            programs = np.concatenate(
                [np.full(len(a), x << 32 | y) for a, (x, y, _) in seen] or [np.zeros(0, int)]
            )
            addresses = np.concatenate([a for a, _ in seen] or [np.zeros(0, np.uint64)])
            return np.unique(np.stack([addresses.astype(np.int64), programs]), axis=1)

        stores, loads = pairs(self.stores), pairs(self.loads)
        assert len(np.unique(stores[0])) == stores.shape[1], (
            f"{self.name}: two programs store to one address"
        )
        loads = loads[:, np.isin(loads[0], stores[0])]
        owner = stores[1][np.searchsorted(stores[0], loads[0])]
        assert (owner == loads[1]).all(), f"{self.name}: a program loads what another one stores"


def span(x: torch.Tensor) -> tuple[int, int, int, int]:
    """The first address and the one after the last; the distance and the length of the contiguous
    pieces, in bytes."""
    size = x.element_size()
    begin = x.data_ptr()
    end = begin + size * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
    if x.is_contiguous() or x.dim() != 2:
        return begin, end, end - begin, end - begin
    (n, columns), (row, column) = x.shape, x.stride()
    if min(row, column) == 1:
        return begin, end, max(row, column) * size, (columns if column == 1 else n) * size
    return begin, end, min(row, column) * size, size


@contextlib.contextmanager
def watching(memory=None):
    """Interpreted kernels run under a `WatchedMemory`; compiled kernels just run."""
    memory = memory or WatchedMemory()
    if not INTERPRETED:
        yield memory
        return
    with (
        mock.patch.object(interpreter, "_interpreter", memory),
        mock.patch.object(
            KERNEL, "run", lambda kernel, *args, **kwargs: memory.run(kernel, *args, **kwargs)
        ),
    ):
        yield memory


class LastProgram(WatchedMemory):
    """Runs only the last program of each launch, or only `program` of a one-dimensional grid."""

    def __init__(self, far=(), program: int | None = None) -> None:
        super().__init__(far)
        self.program = program

    def execute(self, kernel, grid, args, kwargs):
        builder = interpreter.interpreter_builder
        last = [n - 1 for n in grid]
        last = last if self.program is None else [self.program, 0, 0]
        with (
            mock.patch.object(
                builder, "set_grid_dim", lambda *_, real=builder.set_grid_dim: real(*grid)
            ),
            mock.patch.object(
                builder, "set_grid_idx", lambda *_, real=builder.set_grid_idx: real(*last)
            ),
        ):
            super().execute(kernel, (1, 1, 1), args, kwargs)


class Unbacked:
    """Makes tensors at addresses without memory."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.spans: list[tuple[int, int]] = []

    def __call__(self, *shape, dtype=torch.float16):
        size = math.prod(shape) * dtype.itemsize
        nowhere = mmap.mmap(
            -1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        )
        self.tensors.append(torch.frombuffer(nowhere, dtype=dtype).view(shape))
        self.spans.append(span(self.tensors[-1])[:2])
        return self.tensors[-1]
