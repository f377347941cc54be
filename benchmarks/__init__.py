"""The cost of this template, compared with code written by hand. A clone can drop this folder."""
