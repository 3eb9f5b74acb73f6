{
  description = "headrace-fp8-quantisation: FP8 quantisers of DeepSeek-V3's training";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
