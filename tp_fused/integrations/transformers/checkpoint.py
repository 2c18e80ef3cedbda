"""The safetensors files of a folder, read in parts."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from .same_model import Description, described_bytes

# Of safetensors. What is narrower is quantised, and is read as it is.
_FLOATS = ("F64", "F32", "F16", "BF16")
_STORED_AS = {torch.float8_e4m3fn: ("F8_E4M3",), torch.float8_e8m0fnu: ("F8_E8M0", "F32", "BF16")}


class Checkpoint:
    """The safetensors files of a folder. A tensor is read in parts."""

    def __init__(self, folder: Path):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            self._files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        elif single.is_file():
            with safe_open(single, "pt") as opened:
                self._files = dict.fromkeys(opened.keys(), single)
        else:
            raise ValueError(f"{folder} has neither {index.name} nor {single.name}")
        self._opened = {}
        self.folder, self.names = folder, set(self._files)

    def require(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises where the tensor has another shape, or cannot be read as one of dtype."""
        stored, kinds = self._slice(name), _STORED_AS.get(dtype, _FLOATS)
        if tuple(stored.get_shape()) != shape:
            raise ValueError(f"{name} is {tuple(stored.get_shape())} in {self.folder}, expected {shape}")
        if stored.get_dtype() not in kinds:
            raise ValueError(f"{name} is {stored.get_dtype()} in {self.folder}, expected one of {', '.join(kinds)}")

    def read(self, name: str, *index: slice) -> torch.Tensor:
        return self._slice(name)[index or (slice(None),)]

    def _slice(self, name: str):
        path = self._files[name]
        if path not in self._opened:
            self._opened[path] = safe_open(path, "pt")
        return self._opened[path].get_slice(name)

    def describe(self) -> Description:
        """Of every tensor: what it is, and one row of it, unless it is an expert's: there are too many of those."""
        stored, values = {}, {}
        for name in sorted(self.names):
            tensor = self._slice(name)
            shape = tensor.get_shape()
            stored[name] = f"{tensor.get_dtype()} {shape}"
            if ".experts." not in name and len(shape) > 0 and shape[0] > 0:
                row = shape[0] // 2 if len(shape) > 1 else 0
                values[name] = described_bytes(tensor[row : row + (1 if len(shape) > 1 else 64)])
        return {"tensors": stored, "values": values}
