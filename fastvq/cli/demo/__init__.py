"""``fastvq demo``."""
