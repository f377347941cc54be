"""Data sources, and the augmentation of training examples."""
