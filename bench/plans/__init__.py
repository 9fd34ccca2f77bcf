"""What `python -m bench` measures."""
