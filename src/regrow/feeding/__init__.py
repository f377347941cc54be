"""From examples to batches: splits, the order of an epoch, feeds from memory and files."""
