"""Rewrites of a model, one pass a file."""
