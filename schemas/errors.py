"""The errors that a user can do something about. The message of each is one line that says what.

They lie here so that every package can raise them; `lacy.LacyError` is the same class. Any other exception that reaches
the command is a fault of LaCy's own.
"""


class LacyError(Exception):
    """What every known error is. The command prints its message as one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(LacyError):
    """A command line, or an argument, that cannot be as it is."""

    exit_code = 2


class CorpusError(LacyError):
    """A corpus that cannot be read at all."""


class DatasetError(LacyError):
    """A dataset that is missing, damaged, or of another kind than asked for."""


class GrammarError(LacyError):
    """A spaCy pipeline that is missing, or cannot do what the rule needs."""


class ModelError(LacyError):
    """A language model that cannot be had."""


class TokenizerError(LacyError):
    """A tokenizer that cannot be loaded or used."""


class PolicyError(UsageError):
    """A policy that does not exist or cannot be applied."""


class RunError(LacyError):
    """A labelling run that failed."""


class SqlError(LacyError):
    """A query that cannot be answered."""


class TrainingError(LacyError):
    """A training run that cannot start or go on."""


class CascadeError(LacyError):
    """A cascade or an evaluation that cannot be had as asked."""
