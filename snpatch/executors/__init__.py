"""Executors: what runs requests, on transformers or inside vLLM, behind one interface (base)."""
