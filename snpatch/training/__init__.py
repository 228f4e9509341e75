"""Training of the paper's adapters."""
