"""What can go wrong, and the exit code each gives.

::

    CherryError                exit 1
    ├── ConfigError            exit 2   the config is wrong; what only rows can tell comes late
    ├── InputError             exit 2   the corpus cannot be read as asked
    │   ├── NotScoredError     exit 2   units have no part yet
    │   ├── NotTrainedError    exit 2   the model of brief experience is not there yet
    │   └── ChangedError       exit 2   a shard is not the one any more that was listed
    ├── ModelError             exit 2   the model or its tokenizer cannot be used
    ├── ShardError             exit 1   a shard turned out to be unreadable while running
    ├── ScoringError           exit 1   scoring cannot go on: its processes die, whatever the rows
    ├── LostUnitError          exit 1   a unit raised in a stage; recovery.py looks for the row
    ├── TrainingError          exit 1   training cannot go on: its loss is not finite, workers die
    ├── ClusterError           exit 1   a cluster that took a job does not answer any more
    ├── StorageError           exit 1   an object could not be written or read back
    └── AccountingError        exit 1   the parts do not add up to the input

A message names what, where, what was got, what was expected and what to do about it. A run
that finishes above ``score.max_error_fraction``, or that had to skip a shard, is no exception:
it keeps what it scored and exits with ``EXIT_TOLERANCE``.
"""

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_TOLERANCE = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class CherryError(Exception):
    """Base of every error that is shown to the user as a message, without a traceback."""

    exit_code = EXIT_FAILED


class ConfigError(CherryError):
    """The config, or the command line over it, is wrong."""

    exit_code = EXIT_REFUSED


class InputError(CherryError):
    """The input does not exist, may not be read, or is not what the config says it is."""

    exit_code = EXIT_REFUSED


class NotScoredError(InputError):
    """Units of the input have no part yet, and this command measures nothing."""


class NotTrainedError(InputError):
    """Only `cherry run`, `score` and `compare` train the model of brief experience."""


class ChangedError(InputError):
    """An object was overwritten after it was listed, so that what was read of it is not it."""


class ModelError(CherryError):
    """The model or its tokenizer is missing, incomplete or unfit for the settings."""

    exit_code = EXIT_REFUSED


class ShardError(CherryError):
    """A shard whose footer was sound could not be read, or changed, while the run was on."""


class ScoringError(CherryError):
    """Scoring processes die or never start, and no row is to blame."""


class LostUnitError(CherryError):
    """A stage raised what nobody foresaw; its unit is tried again, in the end row by row."""


class TrainingError(CherryError):
    """Training cannot go on: a loss is not finite, or its workers die."""


class ClusterError(CherryError):
    """A cluster that took a job does not answer any more; the job may go on there."""


class StorageError(CherryError):
    """An object could not be written, or is not what was written."""


class AccountingError(CherryError):
    """Rows were lost or doubled: the parts do not add up to the input."""
