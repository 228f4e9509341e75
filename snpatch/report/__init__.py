"""Reports: what an experiment leaves behind, and the ways to show it."""
