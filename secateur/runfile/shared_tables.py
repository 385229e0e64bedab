"""Tables of sensitivity that the trials of a sweep have in common: one worker measures, the others wait for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from secateur.checkpoint.locks import PAUSE
from secateur.engine.events import Steps
from secateur.errors import RunError
from secateur.runfile.storage import Storage

if TYPE_CHECKING:
    from optuna import Study

_LOG = logging.getLogger(__name__)

_PREFIX = "sensitivity "
"""Begins the key under which a study holds a table."""


class SharedTables:
    """Finds tables in a sweep's study, and keeps them there; see :data:`secateur.compensation.sensitivity.Share`.

    It saves time and nothing else: where the storage fails, a table is measured as if there were none.

    Args:
        storage: Of the sweep.
        study: The sweep.
        steps: Where to show that another worker is waited for.
    """

    def __init__(self, storage: Storage, study: Study, steps: Steps) -> None:
        self.storage, self.study, self.steps = storage, study, steps

    def __call__(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the table that is kept under a name; where there is none, measure it and keep it."""
        with ExitStack() as held:
            found = self._tried(lambda: self._waited_for(name, held))
            if isinstance(found, dict):
                _LOG.info("sensitivity: another trial's table serves this one, too")
                return found
            table = measure()
            self._tried(lambda: self.study.set_user_attr(_PREFIX + name, table))
            return table

    def _waited_for(self, name: str, held: ExitStack) -> Any:
        """Take the table's lock, and return the table if another worker had it before and has measured it."""
        waits = False
        while not self.storage.take(f"{self.study.study_name} {name}", held):
            held.pop_all().close()
            if not waits:
                waits = True
                _LOG.info("sensitivity: another trial measures the same; waiting for its table")
            self.steps("waiting for a table of sensitivity", 0, None, "another worker measures it")
            time.sleep(PAUSE)
        return self.study.user_attrs.get(_PREFIX + name)

    def _tried(self, call: Callable[[], Any]) -> Any:
        try:
            with self.storage.lost(RunError):
                return call()
        except RunError as error:
            _LOG.warning("sweep: no table of sensitivity is shared: %s", error)
            return None
