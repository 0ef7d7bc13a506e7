"""The fused loss: the autograd Function, its operators, the loop over chunks, and the
implementations."""
