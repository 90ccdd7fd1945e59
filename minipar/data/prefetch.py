"""Run an iterator ahead in a background thread, a bounded number of items at a time.

The consumer sees the same items in the same order, and an exception where it would have met it.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """`source`, computed ahead by one thread: at most `depth` items are finished or under way.

    The thread runs in a copy of the caller's context (grad mode, the communicator of this rank). It ends
    when the source ends or raises, and on `close`, which returns after it has ended.
    """

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        self._channel: _Channel[Item] = _Channel(depth)
        # The thread gets the channel and not `self`, so it does not keep its own consumer alive.
        self._thread = threading.Thread(target=contextvars.copy_context().run,
                                        args=(_produce, source, self._channel),
                                        name="minipar-prefetch", daemon=True)
        # Also at interpreter exit, while the thread can still be woken and joined.
        self._finalizer = weakref.finalize(self, _stop, self._channel, self._thread)
        self._thread.start()

    def __iter__(self) -> Prefetch[Item]:
        return self

    def __next__(self) -> Item:
        return self._channel.take()

    def close(self) -> None:
        """Stop the thread and wait for it: for the item under way at most."""
        self._finalizer()


class _Channel(Generic[Item]):
    """A bounded queue that either end can close. (`queue.Queue` can be closed from Python 3.13 only.)"""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.items: deque[Item] = deque()
        # Its lock can be taken twice: a finaliser may run close in a thread that holds it.
        self.changed = threading.Condition()
        self.closed = False                      # the consumer wants no more
        self.ended: BaseException | None = None  # why there will be no more: StopIteration or an error

    def has_room(self) -> bool:
        """Wait until there is room for one more item; False if none is wanted any more."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.items) < self.depth)
            return not self.closed

    def put(self, item: Item) -> None:
        with self.changed:
            if not self.closed:
                self.items.append(item)
                self.changed.notify_all()

    def end(self, reason: BaseException) -> None:
        with self.changed:
            self.ended = reason
            self.changed.notify_all()

    def take(self) -> Item:
        """The next item; raises what ended the source once all items before it are taken."""
        with self.changed:
            self.changed.wait_for(lambda: self.items or self.ended or self.closed)
            if self.items:
                item = self.items.popleft()
                self.changed.notify_all()
                return item
            raise self.ended or StopIteration

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.items.clear()
            self.changed.notify_all()


def _stop(channel: _Channel[Item], thread: threading.Thread) -> None:
    channel.close()
    # A garbage collection that happens to run in the thread itself may get here from there.
    if threading.current_thread() is not thread and thread.ident is not None:
        thread.join()


def _produce(source: Iterator[Item], channel: _Channel[Item]) -> None:
    """The thread's whole life: room first, then one item, so that `depth` bounds the memory."""
    try:
        while channel.has_room():
            channel.put(next(source))
    except BaseException as error:  # StopIteration included; whatever it is, the consumer raises it
        channel.end(error)
