# SPDX-License-Identifier: Apache-2.0
"""The SQLite file of the log: its schema, and opening it, or saying in one line why not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kmonitor.broker.log import End
from kmonitor.broker.log.ends import Ends
from kmonitor.broker.log.rows import dropped_from, unsigned
from kmonitor.wire import files
from kmonitor.wire.errors import UsageError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x6B6D6F6E
"""In the file's header: `file` and we know by it whose database it is."""
STRIDE = 1 << 32
"""Offsets go on at a multiple of it after a crash: more than can have been given out without one commit."""

PAGE_BYTES = 8192
"""Large blocks take a third less time than with SQLite's 4096, small ones the same."""
WAL_PAGES = 1024
"""So many, and the log in front of the database is copied into it."""
WAL_BYTES = 16 << 20
"""To so much the file of that log is cut back when a large transaction has made it larger."""
_BUSY_S = 5.0
_READER_BUSY_S = 0.05
_OLDEST_SQLITE = (3, 33)

_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    # The order is that of rows.Row. The large column is the last: SQLite reads the others without it.
    """CREATE TABLE entries (
        offset INTEGER PRIMARY KEY,
        kind INTEGER NOT NULL,
        node TEXT NOT NULL,
        boot_id TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        position INTEGER NOT NULL,
        "end" INTEGER NOT NULL,
        boottime_to_unix_ns INTEGER NOT NULL,
        reach INTEGER NOT NULL,
        last INTEGER,
        time_ns INTEGER NOT NULL,
        logged_ns INTEGER NOT NULL,
        checksum INTEGER NOT NULL,
        data BLOB NOT NULL
    )""",
    "CREATE INDEX entries_by_reach ON entries (node, epoch, reach)",
    # In the order of `id` epochs came first.
    """CREATE TABLE ends (
        id INTEGER PRIMARY KEY,
        node TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        position INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        dropped_last INTEGER,
        dropped_end INTEGER,
        dropped_ns INTEGER,
        UNIQUE (node, epoch)
    )""",
    "CREATE TABLE remembered (space TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (space, key)) WITHOUT ROWID",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
    f"PRAGMA application_id = {APPLICATION_ID}",
)


class LogFileError(UsageError):
    """The log's file cannot be used: damaged, not ours, in use, of another version, or out of reach."""


@dataclass(slots=True)
class Opened:
    """An open log file, and what is read from it at the start."""

    path: Path
    lock: int
    """The descriptor that keeps other brokers out."""
    writing: sqlite3.Connection
    """For the writer's thread, which closes it."""
    reading: sqlite3.Connection
    """For the event loop's thread."""
    log_id: int = 0
    oldest: int = 0
    end: int = 0
    ends: Ends = field(default_factory=Ends)
    values: dict[str, dict[str, bytes]] = field(default_factory=dict)


def code_of(error: sqlite3.Error) -> int:
    """SQLite's primary result code, such as sqlite3.SQLITE_FULL; 0 if it was not SQLite that failed."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def is_full(error: sqlite3.Error, path: Path) -> bool:
    """Whether there is no room. SQLite says "I/O error" where it is the shared memory beside the file that found none."""
    code = code_of(error)
    if code in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}:
        with contextlib.suppress(OSError):
            found = os.statvfs(path.parent)
            return found.f_bavail * found.f_frsize < 1 << 16
    return code == sqlite3.SQLITE_FULL


def is_damaged(error: sqlite3.Error) -> bool:
    """Whether what the file holds is wrong, and not only writing or reading it."""
    return code_of(error) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def open_database(path: Path, ends: Ends) -> Opened:
    """Open or make the file, its folder too, and recover what a crash left. `ends` is filled. Raises LogFileError."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise LogFileError(f"the log {path} takes SQLite 3.33 or later, and Python has {sqlite3.sqlite_version} here: use a newer Python")
    with contextlib.ExitStack() as undo, _explained(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(path)
        undo.callback(os.close, lock)
        # The records hold command lines: they are for nobody else. SQLite gives the files beside it the same mode.
        os.close(files.open_own(path, os.O_RDWR | os.O_CREAT, of_root=False))
        for suffix in ("-wal", "-shm", "-journal"):
            beside = path.with_name(path.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                files.check_own(beside, beside.lstat(), of_root=False, writing=True)
        writing = _connect(path, timeout=_BUSY_S)
        undo.callback(writing.close)
        _check(path, writing)
        writing.execute("PRAGMA journal_mode = WAL")
        writing.execute("PRAGMA synchronous = FULL")
        writing.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        writing.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        reading = _connect(path, timeout=_READER_BUSY_S)  # with a log in front a reader waits for nobody
        undo.callback(reading.close)
        opened = Opened(path, lock, writing, reading, ends=ends)
        _load(opened)
        _reserve(opened)
        undo.pop_all()
        return opened


def _connect(path: Path, *, timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
    # A name that was damaged on the disk must not end the reading of all the others.
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    return connection


def _lock(path: Path) -> int:
    """Not on the database itself: closing any descriptor of that would drop SQLite's own locks."""
    lock = files.open_own(path.with_name(path.name + "-lock"), os.O_RDWR | os.O_CREAT, of_root=False)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        with contextlib.suppress(OSError):  # a full disk; the number only makes the message better
            os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
        os.close(lock)
        raise LogFileError(f"the log {path} is in use by another broker (pid {holder}): stop that one, or name another file") from None
    return lock


def _check(path: Path, connection: sqlite3.Connection) -> None:
    """That it is ours and of our version; an empty one is made so."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION_ID:
        if tables or application:
            raise LogFileError(f"{path} is a database, but no log of kmonitor: name another file")
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('log_id', ?)", (secrets.randbits(62) | 1,))
        connection.execute("COMMIT")
    elif version != SCHEMA_VERSION:
        raise LogFileError(
            f"the log {path} is of version {version}, this broker writes version {SCHEMA_VERSION}: use the broker that made it, "
            "or move the file away, and a new log is made"
        )


def _load(opened: Opened) -> None:
    connection = opened.writing
    meta = dict(connection.execute("SELECT key, value FROM meta"))
    opened.log_id = meta["log_id"]
    (oldest, newest) = connection.execute("SELECT (SELECT min(offset) FROM entries), (SELECT max(offset) FROM entries)").fetchone()
    opened.end = max(meta.get("next", 0), 0 if newest is None else newest + 1)
    opened.oldest = opened.end if oldest is None else oldest
    query = "SELECT node, epoch, position, offset, dropped_last, dropped_end, dropped_ns FROM ends ORDER BY id"
    for node, epoch, position, offset, last, end, time_ns in connection.execute(query):
        dropped = None if last is None else dropped_from(last, end, time_ns)
        opened.ends.load(node, unsigned(epoch), End(unsigned(position), offset, dropped))
    for space, key, value in connection.execute("SELECT space, key, value FROM remembered"):
        opened.values.setdefault(space, {})[key] = value


def _reserve(opened: Opened) -> None:
    """Where the next opening goes on if this broker does not close the log: behind all that it may give out."""
    following = (opened.end // STRIDE + 1) * STRIDE
    try:
        opened.writing.execute("INSERT OR REPLACE INTO meta VALUES ('next', ?)", (following,))
    except sqlite3.OperationalError as error:
        # A broker on a full disk serves live, and says that it cannot write: better than none. Offsets could come twice only if it then
        # crashed before it had written anything.
        if not is_full(error, opened.path):
            raise


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if error.errno in {errno.EPERM, errno.ELOOP, errno.ENXIO} and error.filename is not None and Path(error.filename) != path:
            reason = f"{error.filename}: {reason}"  # of those that lie beside it
        raise LogFileError(f"the log {path} cannot be opened: {reason}: name a file that this user may make and write") from None
    except sqlite3.Error as error:
        if is_full(error, path):
            raise LogFileError(f"the log {path} cannot be opened: disk full: make room there, or name another file") from None
        if isinstance(error, sqlite3.OperationalError) and not is_damaged(error):
            raise LogFileError(f"the log {path} cannot be opened: {error}: name a file that this user may write, on a local disk") from None
        raise _damaged(path, str(error)) from None
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise _damaged(path, f"{type(error).__name__} {error}") from None


def _damaged(path: Path, reason: str) -> LogFileError:
    return LogFileError(f"the log {path} is damaged, or no log ({reason}): move it and {path}-wal away, and a new one is made")
