"""What is read: data sets, their order, and batches on the device."""
