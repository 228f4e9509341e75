"""Runs: texts of many patches, kept and judged; sweeps over them."""
