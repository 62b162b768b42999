"""One module per group of endpoints. Routes read a request, call down, and shape the answer."""
