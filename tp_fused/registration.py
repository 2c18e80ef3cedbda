"""How torch learns of the ops: the native kernel of each, what explains the calls that it refuses, the fake kernel.

`torch.library.Library` registers them: the `custom_op` decorator would cost several times more a call.
"""

import functools
import inspect
import numbers

import torch

from . import checks, compiled, partition, reference
from .groups import get_workspace
from .native import _C

_library = torch.library.Library("tp_fused", "DEF")
# By type: what csrc/torch_ops.cpp calls an argument, whose memory its kernels own.
_KINDS = {"Tensor": "T", "Optional[Tensor]": "?", "str": "s", "float": "f", "int": "i", "bool": "b"}

# torch's dispatcher says so of an argument; the second one, where it would write out a number of some thousand digits.
_REFUSALS = ("Expected a value of type", "Exceeds the limit")


def define(schema: str, fake):
    """Registers an op: the native kernel, and the decorated function for the calls that it refuses."""

    def register(function):
        name = schema[: schema.index("(")]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        implementation = _explained(function, fake)
        arguments = getattr(torch.ops.tp_fused, name).default._schema.arguments
        kinds = "".join(_KINDS[str(argument.type)] for argument in arguments)
        for key in ("CPU", "CUDA") if torch.version.cuda else ("CPU",):
            _C.register_kernel(name, key, kinds, implementation)
        # Tensors of other layouts and devices: the checks have words for them, torch's dispatcher has others.
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        # Without a backward of its own torch would let outputs ask for gradients, and lose them.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"tp_fused::{name}", _checked(fake), lib=_library)
        compiled.keep_order(getattr(torch.ops.tp_fused, name).default)
        return function

    return register


def typed(wrapper):
    """Decorates what people call of an op.

    torch's dispatcher refuses what is not of the schema's types before any kernel hears of it: as a RuntimeError.
    """

    @functools.wraps(wrapper)
    def called(*arguments, **options):
        try:
            return wrapper(*arguments, **options)
        except (RuntimeError, ValueError) as error:
            refused = isinstance(error, NotImplementedError) or any(words in str(error) for words in _REFUSALS)
            if not refused:
                raise
            schema = getattr(torch.ops.tp_fused, wrapper.__name__).default._schema
            given = inspect.signature(wrapper).bind(*arguments, **options).arguments
            _check_types({argument.name: str(argument.type) for argument in schema.arguments}, given)
            raise

    return called


# By the type in an op's schema: how it is called here, and what torch's dispatcher takes for it.
_TYPES = {
    "Tensor": ("a tensor", torch.Tensor),
    "Optional[Tensor]": ("a tensor or None", (torch.Tensor, type(None))),
    "float": ("a number", (numbers.Real, torch.SymFloat)),
    "int": ("an integer", (numbers.Integral, torch.SymInt)),
    "bool": ("True or False", bool),
    "str": ("a string", str),
}


def _check_types(schema: dict[str, str], arguments: dict) -> None:
    """The arguments that the schema knows are of its types, tensors dense."""
    for name, value in arguments.items():
        if name not in schema:
            continue
        words, admitted = _TYPES[schema[name]]
        if not isinstance(value, admitted):
            raise TypeError(f"{name} must be {words}, got {checks.described(value)}")
        if schema[name] == "int" and isinstance(value, numbers.Integral) and not -(2**63) <= int(value) < 2**63:
            raise ValueError(f"{name} must fit into 64 bits, got {checks.described(value)}")
        if schema[name] == "float" and isinstance(value, numbers.Real):
            checks.as_float(name, value)
        if isinstance(value, torch.Tensor):
            checks.given(name, value)


def _explained(function, fake):
    """What the native kernel calls where it refuses, or has met a fault.

    Closed to autograd and autocast: neither sees the torch ops that a call is made of.
    """

    @functools.wraps(function)
    def explained(input, *rest, **options):
        if input is None:  # torch takes that for any tensor
            checks.given("input", input)
        with torch.no_grad(), torch._C._DisableAutocast():
            result = function(input, *rest, **options)
            if result is None:
                fake(input, *rest, **options)  # where torch had no memory for the outputs, it says so again
                name, given = function.__name__[1:], map(checks.described, (input, *rest, *options.values()))
                raise RuntimeError(
                    f"checks.py admits what the native kernel refused: tp_fused.{name}({', '.join(given)}); please "
                    f"report this as a bug of tp_fused"
                )
        return result

    return explained


def unfused(workspace, op, *arguments, product=None):
    """The reference backend's op. Others have none here: their fault is raised, or None returned where there is none.

    product: what torch has multiplied for the native kernel, and says again why it could not.
    """
    if workspace.backend == "reference":
        return reference.call(workspace, op, *arguments)
    workspace.check()
    if product is not None:
        torch.nn.functional.linear(*product)
    return None


def own_rows(tensor: torch.Tensor, num_tokens, group_name: str):
    """For fake kernels: how many of num_tokens rows this rank owns."""
    workspace = get_workspace(group_name, tensor.device)
    return compiled.free_size(num_tokens, lambda n: partition.row_count(n, workspace.rank, workspace.world_size))


def _checked(fake):
    """torch calls the fake kernel, too, where the input is real and another tensor is on the meta device."""

    @functools.wraps(fake)
    def checked(input, *rest, **options):
        checks.given("input", input)
        compiled.tracing()
        for tensor in (*rest, *options.values()):
            if isinstance(tensor, torch.Tensor) and tensor.device != input.device:
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} is on {tensor.device}, the input on {input.device}"
                )
        return fake(input, *rest, **options)

    return checked
