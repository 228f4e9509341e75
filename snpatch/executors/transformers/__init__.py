"""The executor on transformers: any machine, and what the other one is tested against."""
