"""Measurements of time and memory: shapes, a clock, and one file per suite."""
