"""torch's devices: their names across processes, and their memory that torch did not allocate.

Owns what is asked of torch for the memory of devices, and what stands in for it where tests emulate a device.
It allocates nothing, and starts the use of no device by itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from legion_shm.transport.codec_types import Devices

__all__ = ["TORCH_DEVICES", "TorchDevices", "current_devices", "stand_in", "use_devices"]


class _DeviceMemory:
    """Memory as torch and others take it: the CUDA array interface, version 3."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class TorchDevices:
    """torch's own devices, by the ids that all processes of a machine agree on.

    What it knows of GPUs in use it keeps: asking takes 0.1 to 0.3 ms, and the answer stays the same.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._found: dict[str, torch.device] = {}

    def identify(self, device: torch.device) -> tuple[str, str] | None:
        kind = device.type
        if kind == "cpu":
            return None
        if kind == "mps":  # a machine has one
            return kind, ""
        if kind in ("cuda", "xpu"):
            index = device.index or 0
            uuid = self._names.get(index) if kind == "cuda" else None
            if uuid is None:
                uuid = self._uuid(kind, index)
                if kind == "cuda" and self.initialized():
                    self._names[index] = uuid
            if uuid:
                return kind, uuid
        raise LookupError(f"tensors of device {device} can't be sent; pass .cpu()")

    def locate(self, kind: str, uuid: str) -> torch.device | None:
        if kind == "mps":
            return torch.device("mps") if torch.backends.mps.is_available() else None
        if kind not in ("cuda", "xpu"):
            return None
        found = self._found.get(uuid) if kind == "cuda" else None
        if found is not None:
            return found
        module: Any = getattr(torch, kind)
        for index in range(module.device_count() if module.is_available() else 0):
            if self._uuid(kind, index) == uuid:
                found = torch.device(kind, index)
                if kind == "cuda" and self.initialized():
                    self._found[uuid] = found
                return found
        return None

    @staticmethod
    def _uuid(kind: str, index: int) -> str:
        return str(getattr(getattr(torch, kind).get_device_properties(index), "uuid", ""))

    def initialized(self) -> bool:
        cuda: Any = torch.cuda
        return bool(cuda.is_initialized())

    def bytes_at(self, device: torch.device, address: int, nbytes: int) -> torch.Tensor:
        cuda: Any = torch.cuda
        # The tensor is kept for longer than whatever mode this thread is in.
        with cuda.device(device), torch.inference_mode(mode=False), torch.no_grad():
            return torch.as_tensor(cast("Any", _DeviceMemory(address, nbytes)), device=device)

    def synchronize(self, tensor: torch.Tensor) -> None:
        cuda: Any = torch.cuda
        cuda.current_stream(tensor.device).synchronize()


TORCH_DEVICES = TorchDevices()
_stand_in: Devices | None = None


def current_devices() -> Devices:
    """The devices of this process."""
    return TORCH_DEVICES if _stand_in is None else _stand_in


def stand_in() -> Devices | None:
    """What stands in for torch's devices, if anything does: then it is asked of the CPU's tensors too."""
    return _stand_in


def use_devices(devices: Devices | None) -> None:
    """Let something else stand for torch's devices in this process, as tests do; None ends that."""
    global _stand_in
    _stand_in = devices
