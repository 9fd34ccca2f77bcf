"""Costs read from machine code."""
