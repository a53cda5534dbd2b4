"""The exceptions that mean "the caller can mend this".

Knows: nothing of models. The command line prints it as a single line and exits with 2;
anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input. The message states the rule, the value that broke it and, if there is one, the mend."""


class NotOfThisBase(UsageError):
    """A part of the method that this base's layers have no place for."""
