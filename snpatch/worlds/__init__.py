"""Worlds: everything that experiments run on, as a file and opened."""
