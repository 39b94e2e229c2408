"""What one does in a notebook: one supervisor for the session, cells that submit, look and cancel.

    python -i examples/notebook_session.py        or cell by cell in Jupyter or VS Code

No ``with`` here: the supervisor stays open between cells, and ends with the session.
"""

# %% One supervisor for the session. The worker starts in the background while you read on.
from __future__ import annotations

import torch

from legion_shm import JobCancelled, Supervisor, WorkerSpec

legion = Supervisor()
spec = WorkerSpec(engine="graph")
legion.warm_up(spec)

# %% A graph, as a function of its inputs.
graph = {
    "a": {"class_type": "LegionInput", "inputs": {"name": "a"}},
    "b": {"class_type": "LegionInput", "inputs": {"name": "b"}},
    "mix": {
        "class_type": "ImageBlend",
        "inputs": {"image1": ["a", 0], "image2": ["b", 0], "blend_factor": 0.25, "blend_mode": "normal"},
    },
    "out": {"class_type": "LegionOutput", "inputs": {"name": "mixed", "value": ["mix", 0]}},
}

# %% An image that lives in shared memory is sent for free, as often as you like.
white = legion.share(torch.ones(1, 1080, 1920, 3))
black = torch.zeros(1, 1080, 1920, 3)
first = legion.submit(graph, inputs={"a": white, "b": black}, spec=spec).result(timeout=60)
print(first["mixed"].mean(), first.stats.transfers)

# %% A result goes on to the next job without being copied, unless you wrote into it.
second = legion.submit(graph, inputs={"a": first["mixed"], "b": white}, spec=spec).result(timeout=60)
print([(transfer.name, transfer.copies) for transfer in second.stats.transfers])

# %% Changed your mind? Cancel; the worker is ready for the next one.
job = legion.submit(graph, inputs={"a": white, "b": black}, spec=spec)
job.cancel()
try:
    job.result(timeout=60)
    print("it was faster than we were")
except JobCancelled as error:
    print(error)

# %% The workers, and the end of the session (it would also end by itself).
print(legion.workers())
legion.close()
print("still readable:", second["mixed"].mean())
