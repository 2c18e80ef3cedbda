"""The safetensors files of a folder, read in parts."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .same_model import Description, described_bytes

# Of safetensors. What is narrower is quantised, and is read as it is.
_FLOATS = ("F64", "F32", "F16", "BF16")
_STORED_AS = {torch.float8_e4m3fn: ("F8_E4M3",), torch.float8_e8m0fnu: ("F8_E8M0", "F32", "BF16")}


def read_json(path: Path) -> dict:
    try:
        read = json.loads(path.read_text())
    except ValueError as error:  # of bytes that are no text, too
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} is no JSON object, but {str(read)[:40]!r}")
    return read


class Checkpoint:
    """The safetensors files of a folder. A tensor is read in parts."""

    def __init__(self, folder: Path):
        self._index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        self._opened = {}
        if self._index.is_file():
            files = read_json(self._index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ValueError(f"{self._index} has no weight_map from names to files")
            self._files = {name: folder / file for name, file in files.items()}
        elif single.is_file():
            self._files = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise ValueError(f"{folder} has neither {self._index.name} nor {single.name}")
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

    def describe(self, names: set[str]) -> Description:
        """Of these tensors: what they are, and one row of each but the experts', of which there are too many."""
        stored, values = {}, {}
        for name in sorted(names):
            tensor = self._slice(name)
            shape = tensor.get_shape()
            stored[name] = f"{tensor.get_dtype()} {shape}"
            if ".experts." not in name and len(shape) > 0:
                first, count = (shape[0] // 2, 1) if len(shape) > 1 else (0, 64)
                values[name] = described_bytes(tensor[first : first + count])
        return {"tensors": stored, "values": values}

    def _slice(self, name: str):
        path = self._files[name]
        try:
            return self._open(path).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path} has no {name}, which {self._index} says is there") from error

    def _open(self, path: Path):
        if path not in self._opened:
            if not path.is_file():
                raise ValueError(f"{path.parent} lacks {path.name}, which {self._index} names")
            try:
                self._opened[path] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
        return self._opened[path]
