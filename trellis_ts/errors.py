"""The exceptions this package raises on purpose.

    TrellisError
    ├── ConfigError       an option, a configuration file or a call's argument cannot be used
    ├── DataError         a table, a data set or a download is not what it should be
    ├── CheckpointError   a model directory is missing, damaged or of another kind
    └── BackendError      the asked-for implementation cannot run here

A message says what was wrong, what was found and what to do about it, on one line: the command line prints it as it
is and exits with code 2.
"""


class TrellisError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(TrellisError):
    """An option, a configuration file or a call's argument cannot be used."""


class DataError(TrellisError):
    """A table, a data set or a download is not what it should be."""


class CheckpointError(TrellisError):
    """A model directory is missing, damaged, or belongs to something else."""


class BackendError(TrellisError):
    """The implementation that was asked for cannot run here."""
