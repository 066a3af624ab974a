"""The memory operator and its implementations."""
