"""Modules that take the place of a model's linears and norms."""
