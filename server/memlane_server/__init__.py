"""The HTTP side of memlane. It holds text, never tensors: nothing here imports torch."""
