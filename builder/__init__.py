"""Everything that happens before the container starts: resolve, quantize, plan, render, build, verify."""

__version__ = "0.1.0"
