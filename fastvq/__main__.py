"""``python -m fastvq``: the command line."""

from fastvq.cli import main

main()
