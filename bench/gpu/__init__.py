"""Exactness and speed on a GPU, in one call: `python -m bench.gpu --out DIR`."""
