"""Contrastive learning without labels: two views of each example, compared over all processes."""
