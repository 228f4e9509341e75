"""Judges: what scores a completion as an answer to its prompt."""
