"""Code that several experiments share: settings, labels, comparison of rankings, reports of sweeps."""
