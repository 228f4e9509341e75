"""Code that several experiments share: settings, labels, comparisons of rankings, sweep reports, the summary."""
