"""Mutation testing of a sample: see `python -m mutation --help`."""
