"""Patches in Python (patch.py), and as text and JSON (spec.py)."""
