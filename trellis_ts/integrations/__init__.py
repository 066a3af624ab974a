"""Thin adapters to other libraries, one module each, imported on demand: they read, hand on and rename, no more."""
