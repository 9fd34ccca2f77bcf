"""Which implementation runs: the choice, and the three that there are."""
