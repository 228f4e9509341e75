"""Sweeps: completions of many patches, stored, judged and compared."""
