from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from legion_shm import Result, Supervisor, WorkerSpec
from legion_shm.supervisor import spawn
from legion_shm.transport import copying
from legion_shm.transport.born_build import library_path
from tests.reliability.support import code_flow, do, hostile
from tests.system.support import flow, only_worker, pid_of, spec, wait_for

MIB = 1 << 20
SIZE = 4 * MIB

_, LACKING = library_path()
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"tensors cannot be born in arenas here: {LACKING}")


@pytest.fixture
def legion() -> Iterator[Supervisor]:
    with Supervisor(segments="memfd", lease_flush_s=0.005) as supervisor:
        yield supervisor


def made(
    legion: Supervisor, fill: float, *, nbytes: int = SIZE, on: WorkerSpec | None = None
) -> tuple[Result, int]:
    """What a node made, and how often it was copied on its way."""
    job = legion.submit(flow("TestBig", nbytes=nbytes, fill=fill), inputs=[None], spec=on or spec())
    result = job.result(timeout=60)
    return result, result.stats.copies


def made_born(legion: Supervisor, fill: float, *, nbytes: int = SIZE, on: WorkerSpec | None = None) -> Result:
    """The same, once there is room for it to be born in the arena."""
    found: list[Result] = []

    def without_a_copy() -> bool:
        result, copies = made(legion, fill, nbytes=nbytes, on=on)
        found[:] = [result]
        return copies == 0

    wait_for(without_a_copy, "a result left without a copy")
    return found[0]


def warm(legion: Supervisor, *, on: WorkerSpec | None = None) -> None:
    for _ in range(4):
        made_born(legion, 0.5, on=on)


@pytest.mark.parametrize("born", ["auto", "off"])
def test_large_copies_are_made_by_native_code_on_both_sides(legion: Supervisor, born: str) -> None:
    look = code_flow("from legion_shm.transport import copying; out = copying._native is not None")
    job = legion.submit(look, inputs=[None], spec=hostile(born_in_arena=born))
    assert job.result(timeout=60)["output_1"] is True
    assert copying._native is not None


def test_what_a_node_makes_leaves_without_a_copy(legion: Supervisor) -> None:
    warm(legion)
    result = made_born(legion, 3.0)
    transfer = next(t for t in result.stats.transfers if t.direction == "from_worker")
    assert (transfer.referenced_bytes, transfer.copied_bytes) == (SIZE, 0)
    assert float(result["output_1"].min()) == float(result["output_1"].max()) == 3.0


def test_switched_off_it_is_copied_once(legion: Supervisor) -> None:
    off = spec(born_in_arena="off")
    for _ in range(6):
        assert made(legion, 1.0, on=off)[1] == 1
    assert off.key != spec().key


def test_no_block_is_used_again_while_somebody_looks_at_it(legion: Supervisor) -> None:
    warm(legion)
    held = {float(fill): made(legion, float(fill))[0]["output_1"] for fill in range(20)}
    for fill in range(100, 120):
        made(legion, float(fill))
    for expected, tensor in held.items():
        assert float(tensor.min()) == float(tensor.max()) == expected


def test_what_a_node_writes_into_an_output_it_kept_is_seen_by_nobody(legion: Supervisor) -> None:
    warm(legion)
    results = []
    for fill in range(1, 12):
        workflow = flow("TestKeepOutput", fill=float(fill), elements=SIZE // 4)
        result = legion.submit(workflow, inputs=[None], spec=spec()).result(timeout=60)
        results.append((float(fill), result["output_1"], result.stats.copies))
    assert 0 in [copies for _, _, copies in results], "some of them went without a copy"
    for expected, tensor, _ in results:
        assert float(tensor.min()) == float(tensor.max()) == expected
        tensor.fill_(-2.0)  # nor does the worker see what its caller writes
    again = legion.submit(flow("TestAdd"), inputs=[results[0][1]], spec=spec()).result(timeout=60)
    assert float(again["output_1"].max()) == -1.0


def test_a_result_outlives_the_worker_that_it_was_born_in(legion: Supervisor) -> None:
    warm(legion)
    result = made_born(legion, 6.0)
    pid = pid_of(only_worker(legion))
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(worker.pid != pid for worker in legion.workers()), "the worker's end was seen")
    warm(legion)
    assert float(result["output_1"].min()) == float(result["output_1"].max()) == 6.0


def test_a_tensor_given_out_twice_is_sent_once(legion: Supervisor, tmp_path: Path) -> None:
    module = tmp_path / "twice.py"
    module.write_text(
        "import torch\n"
        "class Twice:\n"
        "    RETURN_TYPES = ('*', '*', '*')\n"
        "    FUNCTION = 'run'\n"
        "    @classmethod\n"
        "    def INPUT_TYPES(cls):\n"
        "        return {'required': {'seed': ('INT',)}}\n"
        "    def run(self, seed):\n"
        f"        made = torch.full(({SIZE // 4},), float(seed))\n"
        "        return made, made.view(2, -1)[1], made[:20000]\n"
        "NODE_CLASS_MAPPINGS = {'Twice': Twice}\n"
    )
    on = spec(node_modules=(str(module),))
    copies = []
    for seed in range(8):
        workflow = {
            "node": {"class_type": "Twice", "inputs": {"seed": seed}},
            "out": {
                "class_type": "LegionExporter",
                "inputs": {f"input_{slot + 1}": ["node", slot] for slot in range(3)},
            },
        }
        result = legion.submit(workflow, spec=on).result(timeout=60)
        copies.append(result.stats.copies)
        for name, elements in (("output_1", SIZE // 4), ("output_2", SIZE // 8), ("output_3", 20000)):
            assert float(result[name].sum()) == float(seed) * elements
    assert copies[0] == 1, "what they share, once"
    assert 0 in copies


def test_programs_that_a_worker_starts_get_no_preload(legion: Supervisor, tmp_path: Path) -> None:
    warm(legion)
    value = legion.submit(flow("TestEnviron", name="LD_PRELOAD"), inputs=[None], spec=spec()).result(
        timeout=60
    )
    assert value["output_1"] is None
    maps = Path(f"/proc/{pid_of(only_worker(legion))}/maps").read_text(encoding="ascii")
    assert "/born-" in maps, "the worker itself has it"


def test_a_preload_of_the_users_stays(legion: Supervisor) -> None:
    maps = Path("/proc/self/maps").read_text(encoding="ascii").split()
    libc = next(word for word in maps if word.endswith(("libpthread.so.0", "libm.so.6", "libdl.so.2")))
    on = spec(env={"LD_PRELOAD": libc})
    warm(legion, on=on)
    value = legion.submit(flow("TestEnviron", name="LD_PRELOAD"), inputs=[None], spec=on).result(timeout=60)
    assert value["output_1"] == libc


def test_without_the_shim_everything_works_by_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "library_path", lambda: (None, "there is no C compiler here"))
    with Supervisor(segments="memfd") as legion:
        for fill in (1.0, 2.0, 3.0):
            result, copies = made(legion, fill)
            assert copies == 1
            assert float(result["output_1"][-1]) == fill


def test_where_the_quota_is_used_up_copies_go_on() -> None:
    with Supervisor(segments="memfd", arena_quota_bytes=16 * MIB, arena_wait_s=20.0) as legion:
        for fill in range(8):
            # There is no room for it beside the copies.
            assert float(made(legion, float(fill), nbytes=6 * MIB)[0]["output_1"].max()) == float(fill)
        for fill in range(8):
            assert float(made(legion, float(fill), nbytes=2 * MIB)[0]["output_1"].max()) == float(fill)
        result, _ = made(legion, 9.0, nbytes=15 * MIB)  # all that there is, and regions give way
        assert float(result["output_1"].max()) == 9.0


def test_what_nodes_make_for_themselves_takes_no_shared_memory(legion: Supervisor, tmp_path: Path) -> None:
    module = tmp_path / "inside.py"
    module.write_text(
        "import torch\n"
        "class Inside:\n"
        "    RETURN_TYPES = ('*',)\n"
        "    FUNCTION = 'run'\n"
        "    @classmethod\n"
        "    def INPUT_TYPES(cls):\n"
        "        return {'required': {'seed': ('INT',)}}\n"
        "    def run(self, seed):\n"
        f"        return (float(torch.full(({SIZE // 4},), float(seed)).max()),)\n"
        "NODE_CLASS_MAPPINGS = {'Inside': Inside}\n"
    )
    for seed in range(4):
        workflow = {
            "node": {"class_type": "Inside", "inputs": {"seed": seed}},
            "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["node", 0]}},
        }
        result = legion.submit(workflow, spec=spec(node_modules=(str(module),))).result(timeout=60)
        assert result["output_1"] == seed
    assert only_worker(legion).arena_bytes == 0


def test_memory_goes_back_to_the_system_when_idle() -> None:
    with Supervisor(segments="memfd", idle_trim_s=0.3, lease_flush_s=0.005) as legion:
        warm(legion)
        assert only_worker(legion).arena_bytes > 0
        wait_for(lambda: only_worker(legion).arena_bytes == 0, "the arena was given back")
        warm(legion)


def test_the_arena_holds_little_more_than_what_lives_in_it(legion: Supervisor) -> None:
    last = [made(legion, float(fill), nbytes=16 * MIB)[0] for fill in range(2)]
    for fill in range(2, 30):
        last = [last[-1], made(legion, float(fill), nbytes=16 * MIB)[0]]
    assert float(last[-1]["output_1"][0]) == 29.0
    live = 4 * 16 * MIB  # two looked at, one made, one on its way back
    assert only_worker(legion).arena_bytes <= 1.25 * live


def test_a_small_part_of_what_was_born_does_not_keep_the_whole(legion: Supervisor) -> None:
    """The class of the node has run before, so its outputs are its own tensors and no copies of them."""
    on = hostile()

    def copies(part: str) -> int:
        code = f"import torch; out = torch.full(({SIZE // 4},), 2.0){part}"
        result = do(legion, code).result(timeout=60)
        assert float(result["output_1"].min()) == float(result["output_1"].max()) == 2.0
        return result.stats.copies

    wait_for(lambda: copies("") == 0, "the whole left without a copy")
    eighth = f"[: {SIZE // 32}]"
    assert [copies(eighth), copies(""), copies(eighth)] == [1, 0, 1]
    legion.stop_workers(on)


def test_a_forked_child_of_a_node_keeps_its_hands_off(legion: Supervisor, tmp_path: Path) -> None:
    module = tmp_path / "forker.py"
    module.write_text(
        "import os, torch\n"
        "class Forker:\n"
        "    RETURN_TYPES = ('*',)\n"
        "    FUNCTION = 'run'\n"
        "    @classmethod\n"
        "    def INPUT_TYPES(cls):\n"
        "        return {'required': {'seed': ('INT',)}}\n"
        "    def run(self, seed):\n"
        f"        made = torch.full(({SIZE // 4},), float(seed))\n"
        "        pid = os.fork()\n"
        "        if not pid:\n"
        "            made.fill_(-1.0)\n"
        f"            other = torch.full(({SIZE // 4},), -2.0)\n"
        "            del made, other\n"
        "            os._exit(0)\n"
        "        assert os.waitpid(pid, 0)[1] == 0\n"
        "        return (made,)\n"
        "NODE_CLASS_MAPPINGS = {'Forker': Forker}\n"
    )
    on = spec(node_modules=(str(module),))
    copies = []
    for seed in range(8):
        workflow = {
            "node": {"class_type": "Forker", "inputs": {"seed": seed}},
            "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["node", 0]}},
        }
        result = legion.submit(workflow, spec=on).result(timeout=60)
        assert torch.equal(result["output_1"], torch.full((SIZE // 4,), float(seed)))
        copies.append(result.stats.copies)
    assert 0 in copies
