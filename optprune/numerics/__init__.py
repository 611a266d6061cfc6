"""Numerics for all packages: linear algebra, Gram matrices, precision, rounding bounds, content hashes."""
