"""`pre-kernels diagnose`: from a folder of images to a report on the visual tokens of a
vision-language model."""
