"""Measuring steers: metrics, equal strength, judges, costs, files of completions. Imports no mechanism."""
