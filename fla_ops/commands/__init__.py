# SPDX-License-Identifier: Apache-2.0
"""What `fla-ops <command>` runs, one file a command. Extras are imported by the command that needs them."""

import importlib.util


class CommandError(Exception):
    """Ends a command with one line on stderr and an exit code, without a traceback."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def require(command: str, extra: str, *modules: str) -> None:
    """Raise CommandError with the pip command unless every module can be found."""
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise CommandError(
            f"`fla-ops {command}` needs {' and '.join(missing)}, not installed here. "
            f"Install with: pip install 'fla_ops[{extra}]'",
            code=2,
        )
