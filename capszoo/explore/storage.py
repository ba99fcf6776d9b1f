"""Where a study is kept: Optuna's storage, shared by workers."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from capszoo.errors import UsageError, first_line

from .solution import ExplorationError

_logger = logging.getLogger(__name__)


def check_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        UsageError: If it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UsageError(f'{error.name} is not installed: pip install "capszoo[explore]"') from None


def open_storage(url: str, heartbeat: int, grace: int, retry: Callable) -> Any:
    import optuna
    import sqlalchemy.exc

    engine: dict[str, Any] = {"pool_pre_ping": True}  # a connection that a server or firewall dropped is made anew
    if url.startswith("sqlite"):
        engine["connect_args"] = {"timeout": 60}

    class Storage(optuna.storages.RDBStorage):
        """One whose heartbeat outlives a restart of the server."""

        def record_heartbeat(self, trial_id: int) -> None:
            try:
                super().record_heartbeat(trial_id)
            except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                _logger.warning(f"the storage cannot be reached, the next heartbeat may: {first_line(error)}")

    if url.startswith("postgresql"):
        engine["connect_args"] = {"connect_timeout": 10}
    with storage_errors(url):
        for attempt in range(10):
            try:
                storage = Storage(
                    url.replace("{", "{{").replace("}", "}}"),  # which Optuna formats
                    engine_kwargs=engine,
                    heartbeat_interval=heartbeat,
                    grace_period=grace,
                    heartbeat_stale_trial_callback=retry,
                )
                if url.startswith("sqlite"):
                    _lock_before_reading(storage.engine)
                return storage
            except sqlalchemy.exc.DBAPIError as error:
                # Workers that start at the same moment make the tables of a new database at the same moment.
                beaten = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error.orig)
                if not beaten or attempt == 9:
                    raise
                time.sleep(0.2 * (attempt + 1))
    raise AssertionError("the loop returns or raises")


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn errors of the database into one line."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        text = str(getattr(cause, "orig", cause) or error).strip().splitlines()[0]
        raise ExplorationError(
            f"storage {without_password(url)} cannot be used ({text}): check --storage, such as "
            "postgresql+psycopg://user@host/database"
        ) from None


def without_password(url: str) -> str:
    """A storage's URL as it may be shown."""
    scheme, sign, rest = url.partition("://")
    account, at, place = rest.rpartition("@")
    return f"{scheme}{sign}{account.partition(':')[0]}{at}{place}"


def _lock_before_reading(engine: Any) -> None:
    """Let SQLite's transactions take the lock at once.

    It does not know SELECT ... FOR UPDATE, by which Optuna gives a waiting trial to one worker alone.
    """
    import sqlalchemy

    @sqlalchemy.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before
