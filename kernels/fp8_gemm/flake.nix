{
  description = "headrace-fp8-gemm: FP8 matrix products with DeepSeek-V3's fine-grained scales, dense and grouped";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
