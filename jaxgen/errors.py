"""A user's mistake is told in one line; everything else keeps its traceback."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line."""


class NoSpace(UserError):
    """A disk, a quota or a limit is full: what is only told along the way can be left out, or told later."""


def cli(main: Callable[[], object]) -> Callable[[], None]:
    """Wrap a script's main: a UserError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
