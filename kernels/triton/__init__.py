"""What the custom ops of `vllmc.kernels` run on a GPU: one module of Triton kernels for each."""
