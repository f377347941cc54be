"""Data: data sets, their order, and batches on the device."""
