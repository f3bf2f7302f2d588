"""Adapters: how a model of each framework gets low-bit linears and collectives. The only files that import frameworks.

Every adapter finds the tensor-parallel linears of the host, builds a replacement for each, and swaps it in; `remove`
puts the host's own modules back. Applying twice is the same as applying once.
"""
