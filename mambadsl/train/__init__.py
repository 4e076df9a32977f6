"""Training: from one process to a mesh of pipeline, data and tensor ranks; torch.distributed does the moving."""
