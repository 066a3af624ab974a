"""Launcher for a checkout: ``python cli.py ...`` is ``trellis ...``."""

from trellis_ts.__main__ import main

if __name__ == "__main__":
    main()
