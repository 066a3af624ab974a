"""The long-horizon benchmark: which models are trained, how they are scored, and the tables that come of it."""
