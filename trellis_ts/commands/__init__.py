"""Command line: one module and one function per command."""
