"""`pre-kernels diagnose`: images in, a report on the visual tokens of a vision-language model
out."""
