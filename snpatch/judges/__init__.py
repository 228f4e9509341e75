"""Judges: callables that score a completion as an answer to its prompt."""
