"""One experiment per file, values only; found by name with ``--config NAME``."""
