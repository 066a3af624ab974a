"""A program of the tests: the command line with small blocks and a pause at each step, to be killed in."""

from __future__ import annotations

import sys
import time

from trellis_ts.__main__ import main
from trellis_ts.datasets import partitions, spreading
from trellis_ts.partitioned import jobs

if __name__ == "__main__":
    partitions.CELLS_PER_BLOCK = int(sys.argv[1])
    run, hashed = jobs.ForecastJob.run, spreading.hash_keys

    def run_slowly(self, forecaster, block):
        time.sleep(0.5)
        return run(self, forecaster, block)

    def hash_slowly(*arguments):
        time.sleep(0.5)
        return hashed(*arguments)

    jobs.ForecastJob.run = run_slowly
    spreading.hash_keys = hash_slowly
    main(sys.argv[2:])
