"""Whether the loss is right and fast on this machine: `pre-kernels check`, and what it shares with
the benchmark."""
