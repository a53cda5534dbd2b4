"""A parser of flags that says what is wrong in one line, with the nearest name that it knows.

Knows: how argparse tells an error. Does not know: any command.
"""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from ..errors import nearest


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help tells more)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # told by the command that they were given to, which knows its flags
            known = re.findall(r"--[\w-]+", self.format_help())
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(unknown[0].partition('=')[0], known)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            raise argparse.ArgumentError(action, f"must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}")
