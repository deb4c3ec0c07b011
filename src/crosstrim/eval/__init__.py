"""Benchmarks: what trimming costs in accuracy."""
