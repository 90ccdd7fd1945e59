"""minipar: a reference engine for learning how large models are trained in parallel."""

__version__ = "0.1.0"
