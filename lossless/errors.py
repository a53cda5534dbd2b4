"""The exceptions that mean "the caller can mend this", and the rule that is stated most.

Knows: nothing of models. The command line prints it as a single line and exits with 2;
anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input. The message states the rule, the value that broke it and, if there is one, the mend."""


class NotOfThisBase(UsageError):
    """A part of the method that this base's layers have no place for."""


def require_at_least(least: int, config: object, *names: str) -> None:
    """Raises UsageError for the first of these fields that is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise UsageError(f"{name} must be at least {least}, got {getattr(config, name)}")
