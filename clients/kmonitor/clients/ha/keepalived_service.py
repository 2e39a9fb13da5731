# SPDX-License-Identifier: Apache-2.0
"""Keeps track files as the verdicts of a guard would have them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from kmonitor.clients.guard import ProcessGuard
from kmonitor.clients.ha.keepalived import Opinion, Sight, Track
from kmonitor.clients.ha.keepalived_config import TrackConfig
from kmonitor.clients.ha.keepalived_file import TrackFile
from kmonitor.clients.ha.service_manager import ServiceManager
from kmonitor.clients.verdict import Blindness, Life, Subject, Verdict
from kmonitor.wire.errors import UsageError

_MEND_EVERY_S = 1.0
_ASK_AGAIN_S = 1.0

Say = Callable[[str], None]


def sight(verdict: Verdict) -> Sight:
    """What a verdict is worth now. A pid's end is final, and needs nobody to watch it; all else may have been started again unseen."""
    if verdict.life is Life.DEAD and verdict.subject.pid is not None:
        return Sight.DEAD
    if verdict.blind is not None or verdict.life is Life.UNKNOWN:
        return Sight.BLIND
    return Sight.ALIVE if verdict.life is Life.ALIVE else Sight.DEAD


def in_words(verdict: Verdict) -> str:
    """One line for people."""
    name = verdict.subject.name
    if verdict.blind is not None and verdict.blind is not Blindness.STARTING:
        return f"{name} is out of sight: {verdict.reason or verdict.blind.value}"
    if verdict.life is Life.ALIVE:
        more = f", and {verdict.alive - 1} more" if verdict.alive > 1 else ""
        return f"{name} is alive: pid {verdict.process.pid}{more}" if verdict.process else f"{name} is alive"
    if verdict.life is Life.DEAD:
        return f"{name} has ended: {verdict.death or 'nobody saw how'}"
    return f"{name} is not there: {verdict.reason or 'nothing of it runs'}" if verdict.life is Life.ABSENT else f"{name} is not known yet"


class Writer:
    """One track file, and what it should say. From its start on the file says something that is right for one who sees nothing."""

    def __init__(self, config: TrackConfig, say: Say) -> None:
        self.config = config
        self.file = TrackFile(config.file)
        self._say = say
        self._track: Track | None = None
        self._untold: list[str] = []

    def start(self) -> None:
        """Lock it, and write what is to be said before the first verdict. Raises UsageError."""
        self.file.open()
        said = self.config.said(self.file.read())
        self._track = Track(self.config.policy, [subject.name for subject in self.config.subjects], time.monotonic(), said=said)
        self._write(self._track.up)
        self._say(f"{self.file.path}: {self.config.value(self._track.up)} until the first verdict")

    def take(self, verdict: Verdict) -> None:
        """Of one of its processes, or of another."""
        if self._track is not None and verdict.subject in self.config.subjects:
            self._track.take(verdict.subject.name, sight(verdict), time.monotonic())

    def look(self) -> float:
        """Write what is due; `tell` says why. Returns in how many seconds to look again. Raises UsageError."""
        track = self._track
        assert track is not None  # started
        before = track.up
        due = track.look(time.monotonic())
        if track.up is not before:
            self._write(track.up)
            self._untold.append(f"{self.file.path}: {self.config.value(before)} -> {self.config.value(track.up)}: {self._why(track)}")
        return due - time.monotonic()

    def tell(self) -> None:
        """Say what was written. Not before: a reader of the log can wait."""
        for line in self._untold:
            self._say(line)
        self._untold.clear()

    def mend(self) -> None:
        """Write again what somebody else wrote. Raises UsageError."""
        if self.file.mend():
            self._say(f"{self.file.path} was changed by somebody else, and is written anew: let keepalived's init_file not overwrite it")

    def end(self) -> None:
        """Leave what is to be said when nobody looks any more; let others write. Raises UsageError."""
        track, self._track = self._track, None
        try:
            if track is not None:
                up = self.config.policy.at_first(track.up)
                if up is not track.up:
                    self._write(up)
                self._say(f"{self.file.path}: {self.config.value(up)} from now on: nobody watches")
        finally:
            self.file.close()

    def _write(self, up: bool) -> None:
        self.file.write(self.config.value(up))

    def _why(self, track: Track) -> str:
        counts = ", ".join(
            f"{track.count(each)} {word}"
            for each, word in ((Sight.ALIVE, "alive"), (Sight.DEAD, "dead"), (Sight.BLIND, "out of sight"))
            if track.count(each)
        )
        unsure = f" for {self.config.policy.blind_after:g} s" if track.opinion is Opinion.UNSURE else ""
        return f"{counts}{unsure}; {self.config.policy.quorum} must be alive"


@contextlib.contextmanager
def writing(configs: Sequence[TrackConfig], say: Say) -> Iterator[list[Writer]]:
    """Their writers, started; at the end each leaves its file as it should be without it. Raises the first of their errors."""
    with contextlib.ExitStack() as ends:
        writers = [Writer(config, say) for config in configs]
        for writer in writers:
            ends.callback(writer.end)
            writer.start()
        yield writers


def write_blind(configs: Iterable[TrackConfig], say: Say) -> None:
    """Write what files should say while nobody watches, for one that was killed. Raises UsageError, also if one is being watched."""
    for config in configs:
        file = TrackFile(config.file)
        try:
            file.open()
            found = file.read()
            value = config.value(config.policy.at_first(config.said(found)))
            if found != value:
                file.write(value)
            say(f"{file.path}: {value}: nobody watches")
        finally:
            file.close()


async def serve(guard: ProcessGuard, writers: Sequence[Writer], manager: ServiceManager, say: Say) -> None:
    """Until something ends it: what ends the guard, a file that cannot be written (UsageError)."""
    subjects = {subject.name: subject for writer in writers for subject in writer.config.subjects}
    waiting: set[asyncio.Task[None]] = {asyncio.create_task(_enlist(guard, subject, say)) for subject in subjects.values()}
    following = asyncio.ensure_future(anext(guard))
    mend_at = time.monotonic() + _MEND_EVERY_S
    try:
        while True:
            due = min(mend_at - time.monotonic(), *(writer.look() for writer in writers))
            for writer in writers:
                writer.tell()
            done, _ = await asyncio.wait({following, *waiting}, timeout=max(due, 0.0), return_when=asyncio.FIRST_COMPLETED)
            manager.alive()
            for each in done & waiting:
                each.result()
            waiting -= done
            if following in done:
                verdict = following.result()
                following = asyncio.ensure_future(anext(guard))
                for writer in writers:
                    writer.take(verdict)
                    writer.look()
                say(in_words(verdict))  # the files come first
            if time.monotonic() >= mend_at:
                mend_at = time.monotonic() + _MEND_EVERY_S
                for writer in writers:
                    writer.mend()
    finally:
        for each in (following, *waiting):
            each.cancel()
        await asyncio.gather(following, *waiting, return_exceptions=True)


async def _enlist(guard: ProcessGuard, subject: Subject, say: Say) -> None:
    """Until the broker and the node take it: a node may join later than this, or be upgraded. Until then it is out of sight."""
    told = ""
    while True:
        try:
            await guard.add(subject)
        except UsageError as error:
            if str(error) != told:
                told = str(error)
                say(f"{subject.name} is out of sight: {told}; it is asked for again every {_ASK_AGAIN_S:g} s")
            await asyncio.sleep(_ASK_AGAIN_S)
        else:
            return
