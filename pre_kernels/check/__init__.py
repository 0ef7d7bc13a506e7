"""`pre-kernels check` tests and times the loss on this machine; the benchmark uses its parts
too."""
