"""`pre-kernels demo --real`: the comparison of the demo on a little LLaVA of real pre-trained parts
and on photographs."""
