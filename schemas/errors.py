"""The errors that a user can do something about. The message of each is one line that says what to do.

They live here so that every package can raise them; `lacy.LacyError` is the same class. Any other exception that
reaches the command is a bug in LaCy.
"""


class LacyError(Exception):
    """Base of all known errors. The command prints its message as one line and exits with `exit_code`.

    usage  the command line, or an argument, is wrong: the exit code is that of UsageError
    """

    exit_code = 1

    def __init__(self, message: str = "", *, usage: bool = False):
        super().__init__(message)
        if usage:
            self.exit_code = UsageError.exit_code


class UsageError(LacyError):
    """The command line, or an argument, is wrong."""

    exit_code = 2


class CorpusError(UsageError):
    """A corpus that cannot be read at all."""


class DatasetError(LacyError):
    """A dataset that is missing, damaged, or not of the kind asked for."""


class GrammarError(UsageError):
    """A spaCy pipeline that is missing or lacks what the rule needs."""


class ModelError(LacyError):
    """A language model that cannot be found, loaded or reached."""


class TokenizerError(UsageError):
    """A tokenizer that cannot be loaded or used."""


class PolicyError(UsageError):
    """A policy that does not exist or cannot be applied."""


class RunError(LacyError):
    """A labelling run that failed."""


class SqlError(UsageError):
    """A query that cannot be answered."""


class TrainingError(LacyError):
    """A training run that cannot start or continue."""


class CascadeError(LacyError):
    """A generation or an evaluation that cannot run as asked."""
