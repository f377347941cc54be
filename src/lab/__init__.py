"""The part of the repository that is yours: what is learned, from what, and how."""
