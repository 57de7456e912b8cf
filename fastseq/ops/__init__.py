"""Opaque operators: schemas, shapes for tracing, and gradients around the kernels and the pure-PyTorch loop."""
