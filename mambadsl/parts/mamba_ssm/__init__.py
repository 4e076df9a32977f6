"""The scans of Mamba-1 and Mamba-2, and Mamba-2's whole core, by the kernels of the package mamba-ssm."""
