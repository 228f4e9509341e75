"""The demo model: a small model of a made-up language, so that everything runs on real weights without a download."""

from importlib.resources import files
from pathlib import Path

DEMO_MODEL = Path(str(files(__name__) / "model"))
"""Folder of the shipped models and data (base/, sft/, dpo/, cost/, eval/, ...), experiment.toml and build.json."""
