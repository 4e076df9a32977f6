"""The convolution of recurrent layers by the package causal-conv1d."""
