"""flash-linear-attention's Triton kernels: scans, and a short convolution without a CUDA compiler."""
