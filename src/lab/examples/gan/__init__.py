"""A GAN: two models and two optimizers, updated in turn from each global batch."""
