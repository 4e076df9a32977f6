"""torch's own kernels: attention (SDPA, FlexAttention) and the experts' grouped matrix products."""
