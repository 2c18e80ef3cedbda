"""What the modules of a parallelized model share."""

import contextlib

import torch
import torch.distributed as dist

from ... import ops
from ...groups import get_workspace
from .programs import Fused, Unfused
from .same_tokens import SameTokens, capturing

_WAYS = ("all_reduce", "transport", "fused")


def check_way(way: str) -> None:
    if way not in _WAYS:
        raise ValueError(f"way must be one of {', '.join(_WAYS)}, got {way!r}")


class TensorParallel:
    """What the modules of a parallelized model share; `parallelize` returns it.

    `way` may be set between forwards; all ways run on the same sharded weights:
        "fused"       tp_fused's ops; the residual is scattered
        "all_reduce"  what engines do without: torch.distributed's all-reduce, the residual whole on every rank
        "transport"   "all_reduce", but by `reduce_scatter_rows` and `all_gather_rows`: tells the gain of fusing from
                      the gain of the transport
    `check_tokens` may be set, too: "first", "always" or "never", see `parallelize`. Setting "first" checks the next
    forward.
    `timer`: None, or a function that takes "communication", "rms_norm" or "qkv_a_proj" and returns a context manager,
    which is entered around that part of a forward.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        way: str = "fused",
        check_tokens: str = "always",
        max_num_tokens: int | None = None,
    ):
        self.group, self.rank, self.world_size = group, group.rank(), group.size()
        self._max_num_tokens = max_num_tokens  # None: the workspace's
        self.device = device
        self.timer = None
        self._ways = {
            "all_reduce": Unfused(self, self._all_reduce),
            "transport": Unfused(self, self._all_reduce_rows),
            "fused": Fused(self),
        }
        self.way = way
        self._same_tokens = SameTokens(check_tokens)
        get_workspace(group.group_name, device)  # raises where there is none

    def __deepcopy__(self, memo) -> "TensorParallel":
        """A copied model's ranks are the same."""
        return self

    def __reduce__(self):
        raise TypeError(
            "a parallelized model cannot be pickled: it holds this process's group; save it before parallelize"
        )

    @property
    def workspace(self):
        return get_workspace(self.group.group_name, self.device)

    @property
    def way(self) -> str:
        return self._way

    @way.setter
    def way(self, way: str) -> None:
        check_way(way)
        self._way, self.program = way, self._ways[way]

    @property
    def check_tokens(self) -> str:
        return self._same_tokens.when

    @check_tokens.setter
    def check_tokens(self, when: str) -> None:
        self._same_tokens = SameTokens(when)

    def timed(self, part: str):
        return contextlib.nullcontext() if self.timer is None else self.timer(part)

    def admit(self, parameters: list[str], decoder, args, kwargs):
        """Forward pre-hook of the decoder: what cannot run raises here, on all ranks alike."""
        if kwargs.get("output_hidden_states") or getattr(decoder.config, "output_hidden_states", False):
            raise ValueError("output_hidden_states: a parallelized model has no whole hidden states between layers")
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        embeds, ids = given.get("inputs_embeds"), given.get("input_ids")
        if (embeds is None) == (ids is None):
            return None  # transformers says what is wrong
        shape = tuple(ids.shape if embeds is None else embeds.shape[:-1])
        self._same_tokens.check(self.workspace, self.device, shape, given)
        num_tokens, limit = torch.Size(shape).numel(), self._max_num_tokens or self.workspace.max_num_tokens
        if num_tokens > limit:
            raise ValueError(
                f"a forward of {num_tokens} tokens {shape} is over max_num_tokens={limit}; "
                f"parallelize with a larger one, or prefill in chunks"
            )
        _check_dtypes(self.device.type, decoder.embed_tokens.weight.dtype, embeds)
        # The first layer adds up what the ranks bring. Embeddings of the caller are whole on every rank.
        if embeds is None:
            partial = decoder.embed_tokens.partial(ids)
        else:
            partial = embeds.detach().clone(memory_format=torch.contiguous_format)
            if self.rank != 0:
                partial.zero_()
        return (), {**given, "input_ids": None, "inputs_embeds": partial}

    def compare_generated(self, tokens: torch.Tensor) -> None:
        """The last of them are fed to no forward. Collective."""
        self._same_tokens.check(
            self.workspace, self.device, tuple(tokens.shape), {"input_ids": tokens}, did="generated"
        )

    def _all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and capturing() and _backend(self.group, partial.device.type) == "gloo":
            # Before gloo is called, which would spoil the capture with an error that says nothing.
            raise RuntimeError("an all-reduce through gloo goes by way of the host: no CUDA graph can capture it")
        dist.all_reduce(partial, group=self.group)
        return partial

    def _all_reduce_rows(self, partial: torch.Tensor) -> torch.Tensor:
        return ops.all_gather_rows(ops.reduce_scatter_rows(partial, self.group), partial.shape[0], self.group)


def _backend(group: dist.ProcessGroup, device_type: str) -> str | None:
    """Which of torch.distributed's serves tensors of this device."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(",")).get(device_type)


def _check_dtypes(device_type: str, dtype: torch.dtype, embeds: torch.Tensor | None) -> None:
    """The residual, the partial sums and what the ops return have one dtype, the model's."""
    if embeds is not None and embeds.dtype != dtype:
        raise ValueError(f"inputs_embeds are {embeds.dtype}, the model's hidden states {dtype}: convert them first")
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype
    if autocast != dtype:
        raise ValueError(
            f"torch.autocast to {autocast} is on, and the model is in {dtype}: partial sums would have another dtype "
            f"than the residual. Leave autocast, or convert the model before parallelize"
        )
