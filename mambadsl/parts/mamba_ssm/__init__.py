"""The scans of Mamba-1 and Mamba-2, and the whole cores of Mamba-2 and Mamba-3, by the kernels of mamba-ssm."""
