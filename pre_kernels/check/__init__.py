"""`pre-kernels check` tests and times the loss on this machine; the benchmark uses its parts
too. Importing this package imports no torch."""

IMPLEMENTATIONS = ("blas", "triton", "fp8", "torch")
DTYPES = ("bf16", "fp16", "fp32")
