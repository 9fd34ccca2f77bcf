"""``python -m fastvq``: the command line."""

from fastvq.cli.app import main

main()
