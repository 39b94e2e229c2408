"""Whether a GPU's memory can be shared here: tried with a child process, by the calls that transfers make.

Owns the question for `legion doctor`. It needs no torch, and leaves nothing: memory and process end with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from legion_shm.clock import monotonic_s
from legion_shm.errors import CudaError
from legion_shm.transport.cuda_driver import cuda_driver
from legion_shm.transport.gpu_segment import GpuSegment

__all__ = ["answer", "probe"]

_BYTES = 1 << 20
_WAIT_S = 60.0  # the child makes a context of its own: up to seconds on a machine with many GPUs


def probe(device: str) -> str:
    """Share memory of the device, by UUID, with a child that reads and writes it: what was seen, in words.

    This process must use the device already. Raises CudaError or ArenaFull with the reason why it can't be.
    """
    segment = GpuSegment.create(device, _BYTES)
    try:
        asked = [device, segment.nbytes, segment.handle.hex(), segment.pattern.hex()]
        try:
            done = subprocess.run(
                [sys.executable, "-c", f"from {__name__} import answer; answer()"],
                input=json.dumps(asked),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                capture_output=True,
                text=True,
                timeout=_WAIT_S,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise CudaError(f"the child process could not answer: {error}") from error
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise CudaError(f"a child process could not read it: {last:.300}")
        written = cuda_driver().device(device).read(segment.shared_address(), len(segment.pattern))
        if written != segment.pattern[::-1]:
            raise CudaError("what a child process wrote there did not arrive here")
        opened_ms = float(done.stdout)
        version = cuda_driver().version()
        return (
            f"opened by another process in {opened_ms:.2f} ms, read and written (driver for CUDA {version})"
        )
    finally:
        segment.close()


def answer() -> None:
    """The child's part: open what standard input describes, check it, write the pattern reversed."""
    device, nbytes, handle, pattern = json.loads(sys.stdin.read())
    expected = bytes.fromhex(pattern)
    try:
        driver = cuda_driver().device(device)
        driver.retain()
        started_s = monotonic_s()
        segment = GpuSegment.open(device, nbytes, bytes.fromhex(handle), expected)
    except CudaError as error:
        sys.exit(str(error))
    opened_s = monotonic_s() - started_s
    driver.write(segment.shared_address(), expected[::-1])
    segment.close()
    sys.stdout.write(str(opened_s * 1e3))
