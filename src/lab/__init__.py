"""Your part of the repository: what is learnt, from what, and how."""
