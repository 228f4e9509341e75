"""Helpers that know nothing of models, patches or engines."""
