"""Codebooks as modules."""
