"""Reports: the tables, plots and sentences of an experiment, and the ways to show them."""
