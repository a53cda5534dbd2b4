"""The exceptions that mean "the caller can mend this", and the rules that are stated most.

Knows: how a rule and the value that broke it are said. The command line prints that as a single line and exits with 2;
anything else that escapes is a defect of ours and keeps its traceback. Does not know: models.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any


class UsageError(ValueError):
    """Bad input. The message states the rule, the value that broke it and, if there is one, the mend."""


class NotOfThisBase(UsageError):
    """A part of the method that this base's layers have no place for."""


# what a model's parts end with if they are called in another way than they were made for
class RowsUnknown(RuntimeError):
    """A norm is given a tensor whose rows are not to be told apart."""


CALLED_OTHERWISE = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError)


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that was probably meant, as the end of a sentence; nothing if none is near."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def require_one_of(known: Iterable[str], what: str, value: object) -> None:
    """Raises UsageError for a value that is none of the known names."""
    if value not in (names := list(known)):
        raise UsageError(f"{what} must be one of {', '.join(names)}, got {value!r}{nearest(value, names)}")


def require_seed(seed: int) -> None:
    """Raises UsageError for a number that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed must be at least 0 and below 2**63, got {seed}")


_NAMED = {
    "int": "a whole number", "float": "a finite number", "bool": "True or False", "str": "a text", "None": "None",
    "tuple[int, ...]": "a list of whole numbers", "tuple[float, ...]": "a list of finite numbers",
}  # fmt: skip


def require_types(record: Any) -> None:
    """Raises UsageError for the first field of a dataclass that is not of the plain type that it declares."""
    for field in fields(record):
        value, kinds = getattr(record, field.name), str(field.type).split(" | ")
        if set(kinds) <= _NAMED.keys() and not any(_is(value, kind) for kind in kinds):
            raise UsageError(f"{field.name} must be {' or '.join(_NAMED[kind] for kind in kinds)}, got {value!r}")


def _is(value: Any, kind: str) -> bool:
    if kind.startswith("tuple"):
        return isinstance(value, tuple | list) and all(_is(each, kind[6:-6]) for each in value)
    if kind == "float" and isinstance(value, float):  # numpy's are, too
        return math.isfinite(value)
    return type(value).__name__ in {"float": ("int",), "None": ("NoneType",)}.get(kind, (kind,))


def require_at_least(least: int, config: object, *names: str) -> None:
    """Raises UsageError for the first of these fields that is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise UsageError(f"{name} must be at least {least}, got {getattr(config, name)}")
