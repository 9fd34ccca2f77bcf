"""Adversarial cases and measurements, for the command line, the benchmarks and the tests."""
