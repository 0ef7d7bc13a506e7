"""Loss and gradients of one step against plain PyTorch.

kernels benchmark pre-kernels/pre-kernels --version 0
"""

import torch
from kernels.benchmark import Benchmark

WEIGHT = 0.5  # λ of the paper
SHOWN = 4096  # elements


class PreLossBenchmark(Benchmark):
    """`out` is the loss and the first elements of each gradient. The runner compares with an
    absolute tolerance, so they are in units of the gradient's largest element in plain PyTorch."""

    seed = 0

    def tensors(self, rows: int, dim: int, dtype: torch.dtype) -> None:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device, dtype=dtype)

        w1, w2 = (randn(dim, dim) / dim**0.5 for _ in range(2))
        self.anchor = randn(rows, dim)
        self.inputs = [randn(rows, dim), w1, randn(dim), w2, randn(dim)]
        for tensor in self.inputs:
            tensor.requires_grad_()
        _, gradients = self.gradients(self.kernel.reference.pre_loss)
        self.units = [gradient.abs().max() for gradient in gradients]

    def gradients(self, function) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        hidden, *parameters = self.inputs
        loss = function(hidden, self.anchor, *parameters)
        return loss.detach(), torch.autograd.grad(WEIGHT * loss, self.inputs)

    def step(self, function) -> torch.Tensor:
        loss, gradients = self.gradients(function)
        units = zip(gradients, self.units, strict=True)
        shown = [gradient.flatten()[:SHOWN] / unit for gradient, unit in units]
        return torch.cat([loss.reshape(1), *shown])

    def setup_small_float32(self) -> None:
        self.tensors(256, 512, torch.float32)

    def benchmark_small_float32(self) -> None:
        self.out = self.step(self.kernel.fused_pre_loss)

    def verify_small_float32(self) -> torch.Tensor:
        return self.step(self.kernel.reference.pre_loss)

    def setup_llava_bfloat16(self) -> None:
        """The visual tokens of 16 images of LLaVA-1.5 7B; on a CPU those of one, at width 1,024."""
        on_cpu = self.device == "cpu"
        self.tensors(*((576, 1024) if on_cpu else (9216, 4096)), torch.bfloat16)

    def benchmark_llava_bfloat16(self) -> None:
        self.out = self.step(self.kernel.fused_pre_loss)

    def verify_llava_bfloat16(self) -> torch.Tensor:
        return self.step(self.kernel.reference.pre_loss)
