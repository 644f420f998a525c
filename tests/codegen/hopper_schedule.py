"""Partitions of a kernel and what they wait for, run one step at a time in an order that a schedule picks.

What runs at the same time on a GPU is here a set of actors: one for each partition (warps that share a program), one
for each copy and each product that has been begun and not yet waited for. An actor goes on where the schedule says
so, and may keep any of them waiting for as long as another can go on. A kernel is stuck when none can.

Orders that were not tried are covered by clocks (Lamport 1978, Mattern 1989; epochs as in FastTrack, Flanagan and
Freund 2009): each actor knows how far it has seen every other, each place in memory who wrote and who read it. An
access that does not come after the one that it conflicts with is an error in every order, whether or not it spoils
anything in this one; but for a product that nobody uses: kernels begin one for a block that is not there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

Clock = dict[Hashable, int]
"""For each actor, its last step that is known to be over."""

Choose = Callable[[Sequence["Actor"]], "Actor"]
"""Which of the actors that can go on does."""


class Fault(AssertionError):
    """What a kernel must not do."""


def wrong(said: str) -> None:
    """An access that is wrong whatever becomes of it."""
    raise Fault(said)


def join(clock: Clock, other: Clock) -> None:
    """Know what the other knows, too."""
    for name, step in other.items():
        if clock.get(name, 0) < step:
            clock[name] = step


@dataclass(eq=False)
class Actor:
    """Something that happens beside the rest.

    Attributes:
        name: of a partition, or what a copy or product does.
        group: ``partition 0`` and so on, or ``copies`` or ``products``: what a schedule tells apart.
        ready: whether it can go on.
        happen: what it does, once; a partition has a thread of its own in its place.
        waits: what it waits for, in words.
    """

    name: str
    group: str
    ready: Callable[[], bool] = lambda: True
    happen: Callable[[], None] | None = None
    waits: str = ""


@dataclass
class Queue:
    """What a partition begins and later waits for.

    Attributes:
        begun, waited: how many, and of how many it knows that they are over.
        pending: numbers of those that are not over, from 1.
    """

    begun: int = 0
    waited: int = 0
    pending: list[int] = field(default_factory=list)

    def begin(self) -> int:
        """One more; its number."""
        self.begun += 1
        self.pending.append(self.begun)
        return self.begun

    def end(self, number: int) -> None:
        """One is over."""
        self.pending.remove(number)


@dataclass(eq=False)
class Partition(Actor):
    """Warps that run one program.

    Attributes:
        threads: how many they are.
        clock: what is known to be over.
        unfenced: places that were written and not yet shown to copies and products.
        products, stores: matrix products, and copies out of shared memory.
    """

    threads: int = 128
    clock: Clock = field(default_factory=dict)
    unfenced: list[Place] = field(default_factory=list)
    products: Queue = field(default_factory=Queue)
    stores: Queue = field(default_factory=Queue)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    over: bool = False

    def __post_init__(self) -> None:
        self.clock[self.name] = 1

    def released(self) -> Clock:
        """What somebody who is told now knows; later steps are later."""
        told = dict(self.clock)
        self.clock[self.name] += 1
        return told


@dataclass(eq=False)
class Place:
    """A tile in shared memory, and who has been there.

    Attributes:
        name: in words.
        writer: actor and step that wrote it.
        plain: whether that was by a store of a thread, which copies and products see after a fence only.
        fenced: actor and step of that fence.
        readers: actor and step of all that read what was written, and what to do if they read anything else.
    """

    name: str
    writer: tuple[Hashable, int] | None = None
    plain: bool = False
    fenced: tuple[Hashable, int] | None = None
    readers: list[tuple[Hashable, int, Callable[[str], None]]] = field(default_factory=list)

    def read(
        self, clock: Clock, actor: Hashable, step: int, fenced: bool, spoil: Callable[[str], None] = wrong
    ) -> None:
        """Somebody who knows ``clock`` reads it.

        Args:
            clock: what is known to be over.
            actor, step: who reads, and when that will be over.
            fenced: whether it sees stores of threads after a fence only, as copies and products do.
            spoil: called if it may read anything else than what was written last.
        """
        if self.writer is None:
            spoil(f"{actor} reads {self.name}, which nobody has written")
        elif not _after(clock, self.writer):
            spoil(f"{actor} reads {self.name} before {self.writer[0]} has written it")
        elif fenced and self.plain and not _after(clock, self.fenced):
            spoil(f"{actor} reads {self.name}, whose stores have not been fenced")
        self.readers.append((actor, step, spoil))

    def write(self, clock: Clock, actor: Hashable, step: int, plain: bool) -> None:
        """Somebody who knows ``clock`` writes it; ``plain`` for stores of threads."""
        if self.writer is not None:
            if not _after(clock, self.writer):
                raise Fault(f"{actor} overwrites {self.name}, which {self.writer[0]} is writing")
            if self.plain and not plain and not _after(clock, self.fenced):
                raise Fault(f"{actor} overwrites {self.name}, whose stores have not been fenced")
        for reader, last, spoil in self.readers:
            if reader != actor and not _after(clock, (reader, last)):
                spoil(f"{actor} overwrites {self.name}, which {reader} is reading")
        self.writer, self.plain, self.fenced, self.readers = (actor, step), plain, None, []


def _after(clock: Clock, event: tuple[Hashable, int] | None) -> bool:
    """Whether an event is known to be over."""
    return event is not None and clock.get(event[0], 0) >= event[1]


@dataclass(eq=False)
class Phased:
    """A barrier in memory (``mbarrier``): a phase is over when so many have come, and all bytes that were announced.

    Attributes:
        count: arrivals of a phase.
        copied: whether copies are announced at it.
        clocks: what is known after each phase that is over.
    """

    name: str
    count: int = 1
    come: int = 0
    bytes: int = 0
    copied: bool = False
    gathered: Clock = field(default_factory=dict)
    clocks: list[Clock] = field(default_factory=list)

    @property
    def phase(self) -> int:
        """The number of the phase that is not over, from 1."""
        return len(self.clocks) + 1

    def arrive(self, clock: Clock, arrivals: int = 0, announced: int = 0) -> None:
        """Somebody comes, announces bytes, or has copied some (negative)."""
        self.come += arrivals
        self.bytes += announced
        self.copied |= announced > 0
        join(self.gathered, clock)
        if self.come > self.count:
            raise Fault(f"{self.come} arrivals at {self.name}, which counts {self.count}")
        if self.come == self.count and self.bytes == 0:
            self.gathered[self.name] = self.phase
            self.clocks.append(dict(self.gathered))
            self.come = 0

    def passes(self, parity: int) -> bool:
        """Whether a wait for the phase of this parity returns."""
        return len(self.clocks) % 2 != parity


@dataclass(eq=False)
class Named:
    """A barrier of whole warps (PTX ``bar``).

    Attributes:
        threads: how many threads a phase takes, which all who come must agree on.
        come: who has come in this phase, and with how many threads.
        clocks: what is known after each phase that is over.
    """

    name: str
    threads: int
    come: dict[str, int] = field(default_factory=dict)
    gathered: Clock = field(default_factory=dict)
    clocks: list[Clock] = field(default_factory=list)

    def arrive(self, partition: Partition, threads: int) -> int:
        """Warps come; how many phases have to be over for theirs to be."""
        if threads != self.threads:
            raise Fault(f"{partition.name} counts {threads} threads at {self.name}, others {self.threads}")
        if partition.name in self.come:
            raise Fault(f"{partition.name} comes to {self.name} twice in one phase")
        self.come[partition.name] = partition.threads
        if sum(self.come.values()) > threads:
            raise Fault(f"{self.come} come to {self.name}, which counts {threads} threads")
        awaited = len(self.clocks) + 1
        join(self.gathered, partition.released())
        if sum(self.come.values()) == threads:
            self.clocks.append(dict(self.gathered))
            self.come = {}
        return awaited


class Abandoned(BaseException):
    """Ends the threads of a kernel in which another has failed."""


class Schedule:
    """A thread block that runs in the order that ``choose`` picks.

    Attributes:
        actors: what could go on now or later.
        switches: how often another actor went on.
    """

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._control = threading.Semaphore(0)
        self._own = threading.local()
        self._failure: BaseException | None = None
        self.actors: list[Actor] = []
        self.named: dict[int, Named] = {}
        self.phased: list[Phased] = []
        self.switches = 0

    @property
    def outside(self) -> bool:
        """Whether no partition asks."""
        return not hasattr(self._own, "partition")

    @property
    def partition(self) -> Partition:
        """The partition whose thread asks."""
        found = self._own.partition
        assert isinstance(found, Partition)
        return found

    def begin(self, actor: Actor) -> None:
        """Something happens beside the rest from now on."""
        self.actors.append(actor)

    def pause(self, waits: str = "", ready: Callable[[], bool] = lambda: True) -> None:
        """Let others go on; return when the schedule says so, and not before ``ready``."""
        own = self.partition
        own.waits, own.ready = waits, ready
        self._control.release()
        own.turn.acquire()
        if self._failure is not None:
            raise Abandoned

    def run(self, programs: Sequence[tuple[Callable[[], None], int]]) -> None:
        """Run programs of so many threads each to their end.

        Raises:
            Fault: for what a kernel must not do, being stuck among it.
        """
        threads = []
        partitions = []
        for number, (program, size) in enumerate(programs):
            partition = Partition(f"partition {number}", f"partition {number}", threads=size)
            self.begin(partition)
            partitions.append(partition)
            threads.append(threading.Thread(target=self._guarded, args=(partition, program), daemon=True))
            threads[-1].start()
        while self.actors and self._failure is None:
            able = [actor for actor in self.actors if actor.ready()]
            if not able:
                stuck = "; ".join(f"{actor.name} waits for {actor.waits}" for actor in self.actors)
                self._failure = Fault(f"nobody can go on: {stuck}")
                break
            actor = self._choose(able)
            self.switches += 1
            if isinstance(actor, Partition):
                actor.turn.release()
                self._control.acquire()
                if actor.over:
                    self.actors.remove(actor)
            else:
                assert actor.happen is not None
                self.actors.remove(actor)
                try:
                    actor.happen()
                except BaseException as error:
                    self._failure = error
        for actor in self.actors:
            if isinstance(actor, Partition):
                actor.turn.release()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        for barrier in self.phased:
            known = max(partition.clock.get(barrier.name, 0) for partition in partitions)
            if barrier.copied and (barrier.come or known < len(barrier.clocks)):
                raise Fault(f"the kernel ends before a copy that {barrier.name} announces")

    def _guarded(self, partition: Partition, program: Callable[[], None]) -> None:
        self._own.partition = partition
        partition.turn.acquire()
        try:
            if self._failure is None:
                program()
                self._leave(partition)
        except Abandoned:
            pass
        except BaseException as error:
            if self._failure is None:
                self._failure = error
        partition.over = True
        self._control.release()

    def _leave(self, partition: Partition) -> None:
        """A program ends: nothing that it has begun may go on in memory that is given to another block."""
        for what, queue in (("products", partition.products), ("copies", partition.stores)):
            if queue.waited < queue.begun:
                raise Fault(f"{partition.name} ends before {queue.begun - queue.waited} of its {what}")


def by_rank(groups: Sequence[str]) -> Choose:
    """Whoever stands first among ``groups`` goes on for as long as it can; those that begin first come first."""
    rank = {group: place for place, group in enumerate(groups)}

    def choose(able: Sequence[Actor]) -> Actor:
        return min(able, key=lambda actor: rank[actor.group])

    return choose


def at_random(seed: int) -> Choose:
    """Anybody may go on, and is likely to for a while: one of the actors is favoured until another is."""
    generator = random.Random(seed)
    favourite: list[str] = [""]

    def choose(able: Sequence[Actor]) -> Actor:
        if generator.random() < 0.1 or not favourite[0]:
            favourite[0] = generator.choice(able).group
        likely = [actor for actor in able if actor.group == favourite[0]]
        return generator.choice(likely if likely and generator.random() < 0.8 else able)

    return choose
