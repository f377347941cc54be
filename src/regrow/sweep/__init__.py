"""Many runs at once: planned, frozen, each in a process of its own, and what came of them."""
