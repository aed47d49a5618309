"""Argument parser that suggests names for misspelled options; of several processes, only the first reports an error."""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import takewhile
from typing import Any

REPORT_DELAY = 10
"""Number of seconds that `wait_for_first_process` waits."""


def wait_for_first_process() -> None:
    """Called by a process that has failed, before it reports its error, so that an error of all is reported once.

    Sleeps for `REPORT_DELAY` seconds in all processes that a launcher such as torchrun started, except the first one on
    the machine. If all of them failed with the same error, the first one reports it, and the launcher terminates the
    others during the delay. A process that is still alive afterwards failed with an error of its own, and reports it.
    There is no delay without a launcher, or after torch's process group is initialized.
    """
    initialized = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    if not initialized and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(REPORT_DELAY)


class Parser(argparse.ArgumentParser):
    """Argument parser of a command, with the option ``--traceback`` and suggestions for misspelled options."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.add_argument("--traceback", action="store_true", help="show the traceback of an error")

    @property
    def option_names(self) -> list[str]:
        """Names of all options of the command, e.g. ``--device``."""
        return list(self._option_string_actions)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Returns the parsed arguments. Options and positional arguments can be in any order.

        Exits the process with status 2 if an argument is invalid.
        """
        for text in takewhile(lambda text: text != "--", argv):
            name = text.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in self.option_names):
                self.error(self._unknown_option(name))  # checked before missing options: one may be misspelled
        return self.parse_intermixed_args(argv)

    def error(self, message: str) -> Any:
        wait_for_first_process()
        super().error(message)

    def _unknown_option(self, name: str) -> str:
        from longalign.errors import suggestion

        takes_keys = any(action.dest == "overrides" for action in self._actions)
        if takes_keys and (path := _config_path(name.lstrip("-"))):
            return f"no option {name}; set config keys as path=value, here {path}=..."
        hint = suggestion(name, self.option_names)
        return f"no option {name}{hint or f'; {self.prog} --help lists the available options'}"


def _config_path(key: str) -> str | None:
    """Returns the dotted path of a key of a run's config, e.g. ``loop.lr``; None if there is no such key.

    ``key`` is the path, or its last name alone, e.g. ``lr``. Hyphens stand for underscores.
    """
    from longalign.config.run import RunConfig

    key = key.replace("-", "_")
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        if key == name or key.startswith(f"{name}.") or key in inner:
            return f"{name}.{key}" if key in inner else key
    return None
