"""Where a sweep's workers meet: a database that Optuna keeps, and a lock by which one of them changes it at a time."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint.locks import lock
from secateur.errors import RunError, UsageError, install

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

_LOG = logging.getLogger(__name__)

GRACE = 4
"""A worker from which nothing was heard for so many heartbeats is dead."""
RETRIES = 3
"""So often a trial is begun again whose worker died."""
_KEY = int.from_bytes(b"secateur")
"""PostgreSQL's advisory lock of all sweeps in a database."""


class Storage:
    """A database of sweeps, opened.

    Args:
        url: ``postgresql://…`` or ``sqlite:///FILE``.
        heartbeat: Seconds between two signs of life of a worker.

    Raises:
        UsageError: If Optuna is not installed, the URL is of another kind, or the database can't be reached.
    """

    def __init__(self, url: str, heartbeat: int) -> None:
        require()
        import sqlalchemy
        from sqlalchemy.engine import make_url

        self.heartbeat = heartbeat
        try:
            self._url = make_url(url)
            kind = self._url.get_backend_name()
        except sqlalchemy.exc.ArgumentError:
            kind = ""
        if kind in ("postgres", "postgresql"):
            self._url = self._url.set(drivername="postgresql+psycopg")
        elif kind != "sqlite" or not self._url.database or self._url.database == ":memory:":
            head = url.partition("://")[0]
            raise UsageError(f"--storage {head}://…: is postgresql://USER@HOST/DATABASE, or sqlite:///FILE.")
        self.postgresql = kind != "sqlite"
        self.name = self._url.set(drivername="postgresql" if self.postgresql else "sqlite").render_as_string()
        """The URL without its password."""
        with self.lost(UsageError):
            self._engine = sqlalchemy.create_engine(self._url, poolclass=sqlalchemy.NullPool)
            with self.alone():
                self.optuna = self._opened()

    def _opened(self) -> RDBStorage:
        from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

        options: dict[str, Any] = {"pool_pre_ping": True} if self.postgresql else {"connect_args": {"timeout": 60}}
        return RDBStorage(
            self._url.render_as_string(hide_password=False),
            engine_kwargs=options,
            heartbeat_interval=self.heartbeat,
            grace_period=GRACE * self.heartbeat,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(RETRIES, inherit_intermediate_values=True),
        )

    @contextmanager
    def lost(self, kind: type[UsageError | RunError]) -> Iterator[None]:
        """Turn what a database that can't be reached raises into one line."""
        import sqlalchemy
        from optuna.exceptions import StorageInternalError

        try:
            yield
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
            said = " ".join(str(getattr(cause, "orig", None) or cause).split())
            more = "" if kind is UsageError else "; nothing is lost: the same command goes on with the sweep"
            raise kind(f"storage {self.name}: can't be used: {said}{more}.") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let one worker at a time into the block, over all machines that reach the database.

        The lock goes with the process or the connection that holds it, however they end.
        """
        import sqlalchemy

        if self.postgresql:
            with self._engine.begin() as connection:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _KEY})
                yield
            return
        file = Path(f"{self._url.database}.lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as opened:
            if fcntl is not None:
                fcntl.flock(opened, fcntl.LOCK_EX)
            yield

    def take(self, name: str, held: ExitStack) -> bool:
        """Take a lock of this name until ``held`` is closed; return whether no other worker has it.

        Like that of :meth:`alone`, it goes with the process or the connection. On SQLite see
        :func:`secateur.checkpoint.locks.lock`.
        """
        import sqlalchemy

        key = zlib.crc32(name.encode())
        if self.postgresql:
            connection = held.enter_context(self._engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
            # A key of two numbers is none of one number's.
            query = sqlalchemy.text("SELECT pg_try_advisory_lock(:sweep, :key)")
            return bool(connection.execute(query, {"sweep": _KEY % 2**31, "key": key - 2**31}).scalar())
        return lock(Path(f"{self._url.database}.{key:08x}.lock"), held)

    @contextmanager
    def alive(self, trial_id: int) -> Iterator[None]:
        """Give signs of life for a trial while the block runs."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.heartbeat):
                try:
                    with self.lost(RunError):
                        self.optuna.record_heartbeat(trial_id)
                except RunError as error:
                    _LOG.warning("sweep: no sign of life was written: %s", error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        """Let go of the connections."""
        with suppress(OSError):
            self.optuna.remove_session()
        self.optuna.engine.dispose()


def require() -> None:
    """Refuse a sweep without Optuna.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError(f"sweep: needs Optuna: {install('sweep')}.") from error
    # A line of Optuna's own for each trial would double the sweep's.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
