"""Several ranks: the exchange of a step, DDP and FSDP2."""
