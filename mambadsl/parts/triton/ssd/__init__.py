"""The SSD scan of Mamba-2, forward and backward: one program for a whole chunk of one head."""
