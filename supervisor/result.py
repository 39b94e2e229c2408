"""What a job resolves to: outputs by name, what crossed, where the time went.

Owns the late decoding of a result: a `Delivery` holds leases, and gives them back if nobody ever looks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

from legion_shm.clock import monotonic_s
from legion_shm.errors import LegionError
from legion_shm.transport.codec import TransferStats
from legion_shm.transport.handles import BlockHandle
from legion_shm.transport.messages import Values
from legion_shm.transport.values import FOLDERS, REPORT

__all__ = ["Decoder", "Delivery", "JobStats", "Result", "Transfer"]


@dataclass(frozen=True)
class Transfer:
    """What crossed for one channel in one direction, in bytes.

    ``copied_bytes`` is what was copied, in ``copies`` copies, on the way from the sender's value into
    shared memory; ``referenced_bytes`` what lay in an arena already and went by handle alone;
    ``inline_bytes`` what was small enough to travel inside the message.
    """

    direction: Literal["to_worker", "from_worker"]
    name: str
    tensors: int
    payload_bytes: int
    inline_bytes: int
    copied_bytes: int
    copies: int
    referenced_bytes: int

    @classmethod
    def from_stats(
        cls, direction: Literal["to_worker", "from_worker"], name: str, stats: TransferStats
    ) -> Transfer:
        return cls(
            direction,
            name,
            stats.tensors,
            stats.payload_bytes,
            stats.inline_bytes,
            stats.copied_bytes,
            stats.copies,
            stats.referenced_bytes,
        )


@dataclass(frozen=True)
class JobStats:
    """Where a job's time went, in seconds, and what crossed.

    In order: ``encode_s`` (inputs into shared memory, in the caller's thread), ``queue_s`` (until a worker
    was free), ``to_worker_s`` (wire and wake-up), ``decode_s``, ``execute_s`` (the nodes),
    ``result_encode_s`` (outputs into shared memory), ``from_worker_s`` (wire and wake-up),
    ``result_decode_s`` (views made in the caller's thread). ``total_s`` is submit to resolution.
    """

    engine: str
    worker_id: str
    attempts: int
    nodes_executed: int
    nodes_cached: int
    encode_s: float
    queue_s: float
    to_worker_s: float
    decode_s: float
    execute_s: float
    result_encode_s: float
    from_worker_s: float
    total_s: float
    result_decode_s: float = 0.0
    transfers: tuple[Transfer, ...] = ()

    @property
    def copies(self) -> int:
        """Copies of payload bytes through shared memory, both directions together."""
        return sum(transfer.copies for transfer in self.transfers)


class Result(Mapping[str, Any]):
    """A job's outputs by channel name, in the order of delivery; read-only.

    Tensors are views of shared memory: writable, with writes private to the process, and valid for as
    long as they are referred to, also after the supervisor has closed. ``ui`` is what output nodes
    reported, by node id; ``folders`` where the files are that it names, by their ``type`` (``output``, or
    ``temp``, which goes with its worker); ``stats`` says where the time went; ``engine`` which engine ran it;
    ``has_handles`` whether an output is or holds a `RemoteHandle`, of use only while that worker lives.
    """

    def __init__(
        self,
        outputs: Mapping[str, Any],
        ui: Mapping[str, Any],
        stats: JobStats | Callable[[], JobStats],
        folders: Mapping[str, str] | None = None,
        has_handles: bool = False,
    ) -> None:
        self._outputs = dict(outputs)
        self.has_handles = has_handles
        self.ui = ui
        self.folders: Mapping[str, str] = folders or {}
        self._stats = stats

    @property
    def stats(self) -> JobStats:
        """Where the time went, and what crossed."""
        if not isinstance(self._stats, JobStats):  # worked out for whoever asks
            self._stats = self._stats()
        return self._stats

    @property
    def engine(self) -> str:
        return self.stats.engine

    def __getitem__(self, name: str) -> Any:
        try:
            return self._outputs[name]
        except KeyError:
            raise KeyError(
                f"no output {name!r}; the job delivered {', '.join(self._outputs) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __repr__(self) -> str:
        return f"Result({', '.join(self._outputs) or 'no outputs'}; engine={self.engine})"


class Decoder(Protocol):
    """The supervisor's memory, as far as a result needs it."""

    def unpack(
        self,
        values: Values,
        allow_cpu: bool,
        worker: str,
        remotes: tuple[int, ...],
        pickled: tuple[str, ...] = (),
    ) -> dict[str, object]: ...

    def give_back(
        self, handles: tuple[BlockHandle, ...], worker: str = "", remotes: tuple[int, ...] = ()
    ) -> None: ...

    def expect(self, delivery: Delivery) -> None: ...


class Delivery:
    """Encoded results whose leases are taken: decoded once by whoever asks first, else given back.

    ``stats(result_decode_s)`` gives the job's figures once the decoding has taken so long.

    ``decoder`` hears of it, and calls `settle` before it closes: a result may be read after that too.
    """

    def __init__(
        self,
        values: Values,
        stats: Callable[[float], JobStats],
        decoder: Decoder,
        *,
        worker: str,
        allow_cpu: bool,
        remotes: tuple[int, ...] = (),
        pickled: tuple[str, ...] = (),
    ) -> None:
        self._values, self._stats, self._decoder, self._worker = values, stats, decoder, worker
        self._allow_cpu, self._remotes, self._pickled = allow_cpu, remotes, pickled
        self._lock = threading.Lock()
        self._decoded: Result | LegionError | None = None
        handles = [handle for note in values for handle in note.blocks]
        self._finalizer: weakref.finalize[Any, Any] | None = None
        if handles or remotes:  # else nothing is held, and it can be decoded at any time
            self._finalizer = weakref.finalize(self, decoder.give_back, tuple(handles), worker, remotes)
            self._finalizer.atexit = False
            decoder.expect(self)

    def decode(self) -> Result:
        """The result, or the LegionError that its values raise."""
        self.settle()
        if not isinstance(self._decoded, Result):
            raise self._decoded or LegionError("a result was not decoded")
        return self._decoded

    def settle(self) -> None:
        """Decode now, while the memory is there."""
        with self._lock:
            if self._decoded is None:
                started_s = monotonic_s()
                if self._finalizer is not None:
                    self._finalizer.detach()
                try:
                    outputs = self._decoder.unpack(
                        self._values,
                        self._allow_cpu,
                        self._worker,
                        self._remotes,
                        self._pickled,
                    )
                except LegionError as error:
                    self._decoded = error.with_traceback(None)
                    return
                except BaseException as error:
                    # Ctrl-C, or a codec's own mistake: what was decoded in part is gone.
                    self._decoded = LegionError(f"the result was lost while it was decoded: {error!r}")
                    raise
                ui = cast("dict[str, Any]", outputs.pop(REPORT, {}))
                folders = cast("Mapping[str, str]", ui.pop(FOLDERS, {}))
                stats = partial(self._stats, monotonic_s() - started_s)
                self._decoded = Result(outputs, ui, stats, folders, bool(self._remotes))
