"""How the graph engine calls a node's functions and reads what they return.

Owns ComfyUI's broadcast rule over lists, `async def` node functions, and the forms a result may have. It
never decides what to run, and knows neither caches nor jobs beyond "was this one cancelled".

Every value between nodes is a list: one item for an ordinary value, more where a node declares
OUTPUT_IS_LIST. A node is called once per item of its longest input, shorter inputs repeating their last
item; with INPUT_IS_LIST it is called once, with the lists themselves.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from legion_shm.supervisor.graph_protocol import NodeClass, return_types

__all__ = ["AsyncRunner", "BadResult", "NodeResult", "call_broadcast", "read_results"]

_CANCEL_POLL_S = 0.05
"""How long a cancelled job may go on awaiting: far below what a person notices."""


_PLAIN_RESULTS = frozenset((tuple, list, dict, str, float, bool, type(None)))
"""What most calls return, known not to be awaitable at a glance."""


class BadResult(Exception):
    """A node function returned something that its class does not declare."""


class AsyncRunner:
    """Awaits what `async def` node functions return, on a loop made when needed, for one job."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def gather(self, awaitables: Sequence[Awaitable[object]], check: Callable[[], None]) -> list[object]:
        """Await all of them together; ``check`` is called now and then and may raise to end the wait.

        The first exception ends the others, which are cancelled and awaited before it is raised.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(_gather(awaitables, check))

    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None:
            return
        try:
            loop.run_until_complete(_end_leftovers())
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()


async def _end_leftovers() -> None:
    """Cancel what node functions started and did not await."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _gather(awaitables: Sequence[Awaitable[object]], check: Callable[[], None]) -> list[object]:
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    pending: set[asyncio.Future[object]] = set(tasks)
    try:
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=_CANCEL_POLL_S, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
            check()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks]


def call_broadcast(
    function: Callable[..., object],
    inputs: Mapping[str, Sequence[object]],
    input_is_list: bool,
    *,
    runner: AsyncRunner,
    check: Callable[[], None],
) -> list[object]:
    """Call ``function`` over ``inputs`` by the broadcast rule; ``check`` runs before each call.

    An empty list among the inputs of a node without INPUT_IS_LIST means no call at all.
    """
    results: list[object] = []
    waiting: dict[int, Awaitable[object]] = {}
    try:
        for arguments in _argument_sets(inputs, input_is_list):
            check()
            result = function(**arguments)
            if type(result) not in _PLAIN_RESULTS and inspect.isawaitable(result):
                waiting[len(results)] = cast("Awaitable[object]", result)
            results.append(result)
    except BaseException:
        for awaitable in waiting.values():
            if inspect.iscoroutine(awaitable):
                awaitable.close()
        raise
    if waiting:
        for index, value in zip(waiting, runner.gather(list(waiting.values()), check), strict=True):
            results[index] = value
    return results


def _argument_sets(inputs: Mapping[str, Sequence[object]], input_is_list: bool) -> list[dict[str, object]]:
    if input_is_list:
        return [{name: list(values) for name, values in inputs.items()}]
    single: dict[str, object] = {}
    for name, values in inputs.items():
        if len(values) != 1:
            break
        single[name] = values[0]
    else:
        return [single]
    if any(len(values) == 0 for values in inputs.values()):
        return []
    calls = max(len(values) for values in inputs.values())
    return [
        {name: values[min(index, len(values) - 1)] for name, values in inputs.items()}
        for index in range(calls)
    ]


class NodeResult:
    """What one node gave: ``outputs`` (a list of items per slot, None without any result) and ``ui``."""

    __slots__ = ("outputs", "ui")

    def __init__(self, outputs: list[list[object]] | None, ui: dict[str, object]) -> None:
        self.outputs = outputs
        self.ui = ui


def read_results(results: Sequence[object], node_class: NodeClass) -> NodeResult:
    """Turn the returned values of a node's calls into its outputs; BadResult where they do not fit.

    A call may return a tuple (or list) with one item per RETURN_TYPES entry, a dict with ``ui`` and
    ``result``, or, where nothing is declared, None. A dict without ``result`` gives no outputs.
    """
    expected = len(return_types(node_class))
    if len(results) == 1 and type(results[0]) is tuple and not getattr(node_class, "OUTPUT_IS_LIST", None):
        only = cast("tuple[object, ...]", results[0])
        if len(only) == expected:
            return NodeResult([[item] for item in only], {})
    rows: list[Sequence[object]] = []
    uis: list[Mapping[str, object]] = []
    no_result = 0
    for returned in results:
        value = returned
        if isinstance(value, dict):
            form = cast("dict[str, object]", value)
            if "expand" in form:
                raise BadResult("it returned a subgraph ('expand'), which only the comfy engine can run")
            if form.get("ui"):
                uis.append(_ui_of(form["ui"]))
            if "result" not in form:
                no_result += 1
                continue
            value = form["result"]
        rows.append(_row(value, expected))
    ui = _merge_ui(uis)
    if no_result and rows:
        raise BadResult("some of its calls returned a 'result' and others did not")
    if no_result:
        return NodeResult(None if expected else [], ui)
    return NodeResult(_merge_rows(rows, expected, node_class), ui)


def _row(value: object, expected: int) -> Sequence[object]:
    if value is None and expected == 0:
        return ()
    if not isinstance(value, (tuple, list)):
        hint = "; is a comma missing, as in `return (image,)`?" if expected == 1 else ""
        raise BadResult(
            f"it returned {type(value).__name__} instead of a tuple of {expected} output"
            f"{'' if expected == 1 else 's'}{hint}"
        )
    row = cast("Sequence[object]", value)
    if len(row) != expected:
        raise BadResult(f"it returned {len(row)} outputs, but RETURN_TYPES declares {expected}")
    return row


def _merge_rows(rows: Sequence[Sequence[object]], expected: int, node_class: NodeClass) -> list[list[object]]:
    is_list = [bool(flag) for flag in cast("Sequence[Any]", getattr(node_class, "OUTPUT_IS_LIST", ()))]
    outputs: list[list[object]] = []
    for slot in range(expected):
        if slot >= len(is_list) or not is_list[slot]:
            outputs.append([row[slot] for row in rows])
            continue
        merged: list[object] = []
        for row in rows:
            items = row[slot]
            if not isinstance(items, Iterable) or isinstance(items, (str, bytes, Mapping)):
                raise BadResult(
                    f"output {slot} is a list by OUTPUT_IS_LIST, but it returned {_kind(row[slot])} there"
                )
            merged.extend(cast("Iterable[object]", items))
        outputs.append(merged)
    return outputs


def _ui_of(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise BadResult(f"its 'ui' is {type(value).__name__}, not a dict")
    return cast("Mapping[str, object]", value)


def _merge_ui(uis: Sequence[Mapping[str, object]]) -> dict[str, object]:
    merged: dict[str, list[object]] = {}
    for ui in uis:
        for name, items in ui.items():
            bucket = merged.setdefault(str(name), [])
            if isinstance(items, (list, tuple)):
                bucket.extend(cast("Sequence[object]", items))
            else:
                bucket.append(items)
    return dict(merged)


def _kind(value: object) -> str:
    return type(value).__name__
