"""Errors that a user can act on: one sentence with the field, the condition, the value and the remedy."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A setting, a file or a combination of parts that cannot work. The commands print it and exit with 2."""


class RunStopped(ConfigError):
    """A run that ends itself, with a checkpoint. The commands print the sentence and exit with 2.

    All its processes raise it behind the same optimizer step.
    """


class Stopped(BaseException):
    """A run that was asked to stop and has written a checkpoint; ``code`` is the command's exit code.

    All its processes raise it behind the same optimizer step. It is no ``Exception``, so that nothing on its way takes
    it for an error to be dealt with.
    """

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.reason, self.code = reason, code


class Hurried(Stopped):
    """The run was asked to stop at once, without a checkpoint."""


class ProcessLost(ConfigError):
    """Another process of the run is gone. The commands print the sentence and exit with :attr:`code`."""

    code = 75
    """sysexits' EX_TEMPFAIL: the same command, started again, goes on."""


def require(holds: bool, field: str, condition: str, value: Any, remedy: str) -> None:
    """Raise :class:`ConfigError` in the project's one form unless ``holds``.

    >>> require(False, "estimator.gamma", "be in [0, 1]", 1.5, "use 0 for token-level credit")
    Traceback (most recent call last):
    ...
    opd_lightning.errors.ConfigError: `estimator.gamma` must be in [0, 1], got 1.5; use 0 for token-level credit
    """
    if not holds:
        raise ConfigError(f"`{field}` must {condition}, got {value!r}; {remedy}")
