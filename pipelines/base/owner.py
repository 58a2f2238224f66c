"""Who writes a stage's output directory: one process at a time, on local disks and on object storage alike.

`DIRECTORY/owner/000007.json` names the seventh owner, which writes the file anew every few seconds. Whoever creates
000008.json, which only one can, is the next. That is allowed once the seventh has released the directory, its process
is gone, or its file has not changed for a whole lease by the clock of the one that watches: no two clocks are compared.
Each write below the directory first looks for a later file (`storage.owned`), so that an owner that was stopped for
longer than its lease, and its workers, write nothing more once another has begun.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from . import owner_files, progress, storage
from .storage import Lost

LEASE = 45.0  # seconds without a beat, after which an owner on another machine is replaced
_BEATS = 4.5  # in a lease
_LOOKS = 30  # at another owner's file, in a lease
_owners: set[str] = set()  # by id, of this process, until they are released

P = ParamSpec("P")
R = TypeVar("R")


class Owned(RuntimeError):
    """Another process writes the directory; once it has ended the same command goes on."""


@dataclass(frozen=True)
class Token:
    """An owner, for the processes that work for it."""

    directory: str
    generation: int
    id: str

    def check(self) -> None:
        """Raises Lost where another process has become the owner."""
        latest = owner_files.latest(self.directory)
        if latest == self.generation:
            return
        now = owner_files.parsed(owner_files.content(self.directory, latest))
        if now is None:
            raise Lost(f"{self.directory}/{owner_files.FOLDER} was removed: this process writes nothing more there")
        if now["id"] != self.id:
            raise Lost(
                f"{self.directory} was taken over by {owner_files.described(now)}, after this process had not run, or "
                "not reached its storage, for a while: it writes nothing more there"
            )


class Owner:
    """This process as the owner of a directory. lost: whether a beat has found that another has taken over."""

    def __init__(self, directory: str, lease: float) -> None:
        self.directory, self.lost = directory, False
        self._record = owner_files.of_this_process(lease)
        self._generation = 0
        self._beaten = _clock()
        self._lock = threading.Lock()
        self._over = threading.Event()
        _owners.add(self._record["id"])

    @property
    def token(self) -> Token:
        return Token(self.directory, self._generation, self._record["id"])

    def take(self, *, wait: bool) -> None:
        """Become the owner. Raises Owned where another process is; wait: until it has released the directory."""
        lease = self._record["lease"]
        before: tuple[int, bytes] | None = None
        still, looked = 0.0, time.monotonic()  # for how long the other owner's file has not changed
        while True:
            number = storage.retried(owner_files.latest)(self.directory)
            content = owner_files.content(self.directory, number)
            other = owner_files.parsed(content)
            lease = other["lease"] if other else lease
            state = owner_files.state_of(other, _owners) if other else "unknown"
            if number == 0 or state == "gone" or still >= lease:
                if self._create(number + 1):
                    return
                before, still = None, 0.0
                continue
            now = time.monotonic()
            if before == (number, content):
                still += min(now - looked, 2 * lease / _LOOKS)  # this process may have been stopped itself
            elif other and not wait and (state == "runs" or (before and owner_files.parsed(before[1]))):
                raise Owned(
                    f"{self.directory} is being written by {owner_files.described(other)}: wait for its end, or end it"
                )
            else:
                still = 0.0
                if other and not wait:
                    progress.say(
                        "owner",
                        f"{self.directory}: looks for {lease:.0f} s whether {owner_files.described(other)} is alive",
                    )
            before, looked = (number, content), now
            time.sleep(0.1 if wait else lease / _LOOKS)

    def check(self) -> None:
        """Raises Lost where another process has become the owner. After a lease without a beat this one becomes the
        owner once more before it writes, so that nobody who has watched it can become that at the same time."""
        with self._lock:
            if _clock() - self._beaten > self._limit() and os.getpid() == self._record["pid"]:
                self.token.check()
                if not self._create(self._generation + 1):
                    self.token.check()
            self.token.check()

    def beat(self) -> None:
        """Say that this process is alive. Raises Lost where another has become the owner."""
        self.check()
        with self._lock:
            began = _clock()
            self._record["beats"] += 1
            self._write()
            self._beaten = began

    def keep_beating(self) -> None:
        """Until `release`."""
        while not self._over.wait(self._record["lease"] / _BEATS):
            try:
                self.beat()
            except Lost:
                self.lost = True
                return
            except Exception:  # storage that cannot be reached now; another beat follows
                continue

    def release(self) -> None:
        self._over.set()
        _owners.discard(self._record["id"])
        with contextlib.suppress(Exception):  # of storage that fails now: whoever comes next looks for a lease
            if self._generation and os.getpid() == self._record["pid"]:  # not a fork of the owner, which ends
                self.token.check()
                with self._lock:
                    self._record["released"] = True
                    self._write()

    def _limit(self) -> float:
        return self._record["lease"] * (1 - 1 / _BEATS)

    def _create(self, number: int) -> bool:
        """Write the file of a new owner, if nobody else has; whether this process is now the latest."""
        began, mine = _clock(), {**self._record, "released": False}
        owner_files.create_only(owner_files.path_of(self.directory, number), json.dumps(mine).encode())
        there = owner_files.parsed(owner_files.content(self.directory, number))
        latest = storage.retried(owner_files.latest)(self.directory)
        if there is None or there["id"] != self._record["id"] or latest != number:
            return False
        self._generation, self._beaten = number, began
        for name in storage.names(f"{self.directory}/{owner_files.FOLDER}"):
            if 0 < owner_files.number_of(name) < number or name.endswith(".tmp"):
                storage.remove(f"{self.directory}/{owner_files.FOLDER}/{name}")
        return True

    def _write(self) -> None:
        storage.write_bytes(owner_files.path_of(self.directory, self._generation), json.dumps(self._record).encode())


@contextlib.contextmanager
def owned(directory: str, *, wait: bool = False, lease: float | None = None) -> Iterator[Owner]:
    """Within the block this process is the directory's owner. Raises Owned where another process is; an owner whose
    process is gone from this machine is replaced at once, one elsewhere after a lease without a beat.

    wait: until another owner has released it, in place of Owned. lease: LEASE, if not given.
    """
    owner = Owner(directory, lease or LEASE)
    with contextlib.ExitStack() as stack:
        stack.callback(owner.release)
        owner.take(wait=wait)
        threading.Thread(target=owner.keep_beating, daemon=True, name="owner").start()
        storage.owned[directory] = owner.check
        stack.callback(storage.owned.pop, directory, None)
        yield owner


@contextlib.contextmanager
def working_for(token: Token) -> Iterator[None]:
    """Within the block this process writes to the token's directory only as long as the owner is the same."""
    if token.directory in storage.owned:  # the owner's own process
        yield
        return
    storage.owned[token.directory] = token.check
    try:
        yield
    finally:
        storage.owned.pop(token.directory, None)


@dataclass
class _Scope:
    """What a function, or this process, owns until it ends."""

    owners: dict[str, Owner] = field(default_factory=dict)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


_process = _Scope()
atexit.register(_process.stack.close)
_scope: ContextVar[_Scope] = ContextVar("scope", default=_process)


def until_return(function: Callable[P, R]) -> Callable[P, R]:
    """A function that owns each directory that is claimed within it, until it returns."""

    @functools.wraps(function)
    def owning(*args: P.args, **kwargs: P.kwargs) -> R:
        scope = _Scope(dict(_scope.get().owners))
        before = _scope.set(scope)
        try:
            with scope.stack:
                return function(*args, **kwargs)
        finally:
            _scope.reset(before)

    return owning


def carried(function: Callable[P, R]) -> Callable[P, R]:
    """A function for tasks in other processes, which write below what this process owns now as long as it does."""
    tokens = [owner.token for owner in _scope.get().owners.values()]

    @functools.wraps(function)
    def working(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            for token in tokens:
                stack.enter_context(working_for(token))
            return function(*args, **kwargs)

    return working


def claim(directory: str) -> Owner:
    """Become the owner of a directory until the innermost function that is decorated by `until_return` returns, outside
    of any until this process ends; nothing changes where it is the owner already. Raises Owned."""
    scope = _scope.get()
    there = scope.owners.get(directory)
    if there is not None and there is _process.owners.get(directory):
        try:
            storage.retried(there.check)()
        except Lost:  # removed, or made by another process, since a notebook began there
            there = None
    if there is None:
        there = scope.owners[directory] = scope.stack.enter_context(owned(directory))
    return there


def _clock() -> float:
    """Seconds, with those that the machine was suspended for where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
