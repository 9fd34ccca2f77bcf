"""The certified search."""
