"""Partitions of a block as threads, of which one runs at a time.

At every operation on a barrier, a copy or a product the one of highest priority goes on that can; priorities
are drawn anew now and then by a seeded generator, so that each partition at times runs far ahead of the rest.
Where nobody can go on the block hangs, as it would on the chip for ever: `Deadlock` says who waits for what.
"""

import random
import threading


class Fault(AssertionError):
    """A kernel broke a rule of the machine."""


class Deadlock(Fault):
    """Every partition waits."""


class _Stopped(BaseException):
    """Ends the threads of a block in which another one failed."""


class Partition:
    """One of the warp groups that a kernel is split into.

    Attributes:
        name: of its function, with its number.
        inflight: products that were issued and not waited for, oldest first.
        stores: copies out of shared memory that were issued and not waited for.
    """

    def __init__(self, name, number):
        self.name, self.number = name, number
        self.inflight, self.stores = [], []
        self.turn = threading.Semaphore(0)
        self.ready, self.waits_for = _always, ""
        self.over = False

    def finish(self):
        """Nothing may be left under way."""
        if self.inflight:
            raise Fault(f"{self.name} ends with {len(self.inflight)} products that it never waited for")
        if self.stores:
            raise Fault(
                f"{self.name} ends without tma.store_wait: shared memory may be gone before it is read"
            )


def _always():
    return True


class Scheduler:
    """Runs the partitions of one block; `seed` decides in which order."""

    CHANGES = 0.1  # how often priorities are drawn

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.local = threading.local()
        self.kernel = Partition("the kernel", 0)
        self.partitions = []
        self.ended, self.stopped, self.error = threading.Semaphore(0), False, None

    @property
    def current(self):
        """The partition that runs."""
        return getattr(self.local, "partition", self.kernel)

    def run(self, calls):
        """Calls every (function, arguments) as a partition; raises the first error of one."""
        self.partitions = [Partition(f"{f.__name__} ({i})", i + 1) for i, (f, _) in enumerate(calls)]
        threads = [
            threading.Thread(target=self._work, args=(p, *call), daemon=True)
            for p, call in zip(list(self.partitions), calls)
        ]
        for thread in threads:
            thread.start()
        everybody = list(self.partitions)
        self._next().turn.release()
        self.ended.acquire()
        self.stopped = True
        for partition in everybody:
            partition.turn.release()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _work(self, partition, function, arguments):
        self.local.partition = partition
        partition.turn.acquire()
        if self.stopped:
            return
        try:
            function(*arguments)
            partition.finish()
            partition.over = True
            chosen = self._next()
        except _Stopped:
            return
        except BaseException as error:
            self.error, chosen = error, None
        (chosen.turn if chosen else self.ended).release()

    def _next(self):
        """Whose turn it is, None where all have ended."""
        if self.random.random() < self.CHANGES:
            self.random.shuffle(self.partitions)
        left = [p for p in self.partitions if not p.over]
        for partition in left:
            if partition.ready():
                return partition
        if left:
            waits = "; ".join(f"{p.name} waits for {p.waits_for}" for p in left)
            raise Deadlock(f"nobody can go on: {waits}")
        return None

    def pause(self, ready=_always, waits_for=""):
        """Lets others run until `ready()` and this one's turn."""
        partition = self.current
        if partition is self.kernel:
            if not ready():
                raise Deadlock(f"nobody can go on: the kernel waits for {waits_for}")
            return
        partition.ready, partition.waits_for = ready, waits_for
        chosen = self._next()
        if chosen is not partition:
            chosen.turn.release()
            partition.turn.acquire()
            if self.stopped:
                raise _Stopped
