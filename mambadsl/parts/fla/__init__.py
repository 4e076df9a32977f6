"""flash-linear-attention's Triton kernels: the delta rules, and a short convolution without a CUDA compiler."""
