{
  description = "Fused loss of Predictive Regularization";

  inputs = {
    # A commit of the builder. Its own inputs are pinned by its lock file.
    kernel-builder.url = "github:huggingface/kernels/8ac69fc542a4306eade0759ef7c45b4f2ae57df0";
  };

  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
