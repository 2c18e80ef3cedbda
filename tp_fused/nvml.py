"""What NVIDIA's driver tells of itself and of the links between GPUs, through NVML."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

P2P_READ, P2P_NVLINK, P2P_OK = 0, 2, 0  # nvmlGpuP2PCapsIndex_t, nvmlGpuP2PStatus_t
P2P_WHY_NOT = {
    1: "the chipset does not support it",
    2: "the GPU does not support it",
    3: "they are behind different I/O hubs",
    4: "a registry key of the driver disables it",
    5: "not supported",
}


@dataclass(frozen=True)
class Nvml:
    driver: str
    _handle: Callable
    _status: Callable

    def status(self, uuid: str, other: str, index: int) -> int | None:
        """What keeps two GPUs, by torch's uuids, from reading each other or from NVLink; P2P_OK: nothing.

        None where NVML does not tell, as of parts of a GPU (MIG).
        """
        try:
            return int(self._status(self._handle(f"GPU-{uuid}"), self._handle(f"GPU-{other}"), index))
        except Exception:  # each package has its own
            return None


@functools.cache
def connect() -> tuple[Nvml | None, str]:
    """NVML, by way of cuda-python or pynvml; or None, and what keeps it from being there."""
    try:
        try:
            from cuda.bindings import nvml  # pyright: ignore[reportMissingImports]

            nvml.init_v2()
            version, handle, status = (
                nvml.system_get_driver_version,
                nvml.device_get_handle_by_uuid,
                nvml.device_get_p2p_status,
            )
        except ImportError:  # not installed, or without the numpy that it wants
            import pynvml  # pyright: ignore[reportMissingImports]

            pynvml.nvmlInit()
            version, handle, status = (
                pynvml.nvmlSystemGetDriverVersion,
                pynvml.nvmlDeviceGetHandleByUUID,
                pynvml.nvmlDeviceGetP2PStatus,
            )
        return Nvml(version(), handle, status), ""
    except ImportError:
        return None, "neither cuda.bindings.nvml nor pynvml is installed"
    except Exception as error:  # each package has its own, of a driver that is missing or does not answer
        return None, str(error)
