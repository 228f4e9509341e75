"""Patches: what overwrites which neurons where."""
