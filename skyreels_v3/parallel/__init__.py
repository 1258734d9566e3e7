"""One video on several processes, in torch.distributed's words."""
