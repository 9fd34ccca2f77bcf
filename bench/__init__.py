"""Evidence for what fastvq claims: commands anyone can run."""
