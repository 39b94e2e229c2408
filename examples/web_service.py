"""A web service that runs a graph per request: POST a PNG to /invert, get the inverted PNG.

    python examples/web_service.py --port 8080
    curl --data-binary @photo.png http://127.0.0.1:8080/invert > inverted.png

Needs aiohttp: ``pip install -e ".[web]"``. The supervisor lives as long as the service does.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from collections.abc import AsyncIterator

import numpy as np
import torch
from aiohttp import web
from PIL import Image, UnidentifiedImageError

from legion_shm import JobError, QueueFull, Supervisor, WorkerSpec

WORKFLOW = {
    "in": {"class_type": "LegionImporter", "inputs": {}},
    "invert": {"class_type": "ImageInvert", "inputs": {"image": ["in", 0]}},
    "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["invert", 0]}},
}
SPEC = WorkerSpec(engine="graph", max_workers=2, env={"OMP_NUM_THREADS": "1"})
LEGION = web.AppKey("legion", Supervisor)


def read_image(body: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(body)) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB")).astype("float32") / 255).unsqueeze(0)


def write_png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


async def invert(request: web.Request) -> web.Response:
    try:
        image = await asyncio.to_thread(read_image, await request.read())
    except UnidentifiedImageError as error:
        said = "the body is no image that Pillow can read; send the bytes of a PNG or JPEG file\n"
        raise web.HTTPUnsupportedMediaType(text=said) from error
    try:
        job = await request.app[LEGION].asubmit(WORKFLOW, inputs=[image], spec=SPEC, deadline_s=30, retries=1)
        result = await job
    except QueueFull as error:
        raise web.HTTPServiceUnavailable(text=str(error)) from error
    except JobError as error:
        raise web.HTTPInternalServerError(text=str(error)) from error
    png = await asyncio.to_thread(write_png, result["output_1"])
    return web.Response(body=png, content_type="image/png")


async def supervisor(app: web.Application) -> AsyncIterator[None]:
    legion = Supervisor(max_queue=100)
    app[LEGION] = legion
    legion.warm_up(SPEC)
    yield
    await asyncio.to_thread(legion.close)


def make_app() -> web.Application:
    app = web.Application(client_max_size=64 << 20)
    app.cleanup_ctx.append(supervisor)
    app.router.add_post("/invert", invert)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080)
    web.run_app(make_app(), host="127.0.0.1", port=parser.parse_args().port)
