"""Triton code. Each module holds the kernels of its namesake one folder up, which launches them."""
