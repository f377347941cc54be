"""Measurements on a GPU, in parts that can be repeated one by one; see `__main__`."""
