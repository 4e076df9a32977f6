"""Our own Triton kernels, one file for each thing they compute. Importing a file here imports torch and Triton."""
