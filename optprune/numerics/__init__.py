"""Numerics that every floor above takes for granted: precision, definiteness, content hashes."""
