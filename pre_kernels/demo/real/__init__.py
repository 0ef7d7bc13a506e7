"""`pre-kernels demo --real`: the comparison of the demo on a little LLaVA of real pre-trained parts, a
text LLM and an ImageNet encoder, and photographs."""
