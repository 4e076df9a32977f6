"""flash-linear-attention's Triton kernels: the short convolution of recurrent layers without a CUDA compiler."""
