"""Data sets, the order of examples, and batches on the device."""
