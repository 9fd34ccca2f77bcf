"""The measurements of `python -m bench`."""
