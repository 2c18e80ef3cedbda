"""The C API of libtp_fused (csrc/tp_fused.h), as far as compare_builds.py calls it.

tests/test_compare_builds.py compares the layouts with the header's; `load` the sizes with those of a build.
"""

import ctypes
from pathlib import Path

Pointer = ctypes.c_void_p


class Call(ctypes.Structure):
    _fields_ = [
        ("op", ctypes.c_uint16),
        ("dtype", ctypes.c_uint16),
        ("eps", ctypes.c_float),
        ("num_tokens", ctypes.c_int64),
        ("hidden_size", ctypes.c_uint32),
        ("columns", ctypes.c_uint32),
        ("group_size", ctypes.c_uint32),
        ("variant", ctypes.c_uint32),
        ("kv_columns", ctypes.c_uint32),
        ("buffer", ctypes.c_uint32),
        ("source", ctypes.c_int64),
        ("q_columns", ctypes.c_uint32),
        ("weight_offset", ctypes.c_float),
    ]


class Team(ctypes.Structure):
    _fields_ = [
        ("rank", ctypes.c_int32),
        ("world_size", ctypes.c_int32),
        ("region", Pointer * 8),
        ("slot_bytes", ctypes.c_int64),
        ("timeout_ns", ctypes.c_int64),
        ("max_ctas", ctypes.c_int32),
        ("liveness_fd", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("mailbox", Pointer),
        ("interrupted", Pointer),
        ("free_sms", ctypes.c_int32),
        ("free_cluster_sms", ctypes.c_int32),
    ]


class Symm(ctypes.Structure):
    _fields_ = [("base", Pointer * 8), ("offset", ctypes.c_int64), ("buffer", ctypes.c_uint32)]


class Projection(ctypes.Structure):
    _fields_ = [
        ("input", Pointer),
        ("scale", Pointer),
        ("scale_row_stride", ctypes.c_int64),
        ("scale_group_stride", ctypes.c_int64),
        ("weight", Pointer),
        ("weight_scale", Pointer),
        ("bias", Pointer),
        ("q_a_weight", Pointer),
        ("kv_a_weight", Pointer),
        ("q_columns", ctypes.c_int32),
        ("kv_columns", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("weight_offset", ctypes.c_float),
        ("q_a_scale", Pointer),
        ("q_a_scale_row_stride", ctypes.c_int64),
        ("q_a_scale_group_stride", ctypes.c_int64),
    ]


STRUCTS = {"tpf_call": Call, "tpf_team": Team, "tpf_symm": Symm, "tpf_projection": Projection}
REDUCTION = [
    *(Pointer, Pointer, Pointer, ctypes.POINTER(Symm), Pointer, Pointer, ctypes.POINTER(Team)),
    *(ctypes.c_int64, ctypes.c_int32, ctypes.c_int, ctypes.c_float, ctypes.c_float, ctypes.c_uint32, Pointer),
]
FUNCTIONS = {
    "tpf_barrier_cuda": [ctypes.POINTER(Team), Pointer],
    "tpf_rs_rmsnorm_cuda": REDUCTION,
    "tpf_rs_rmsnorm_ag_cuda": REDUCTION,
    "tpf_all_gather_rows_cuda": [
        *(Pointer, Pointer, ctypes.POINTER(Team), ctypes.c_int64, ctypes.c_int32, ctypes.c_int, Pointer)
    ],
    "tpf_qkv_a_proj_ag_cuda": [
        *(ctypes.POINTER(Pointer), ctypes.POINTER(Projection), ctypes.POINTER(Team), ctypes.POINTER(Call), Pointer)
    ],
}


def load(path: Path) -> ctypes.CDLL:
    """A build of libtp_fused, its functions declared. Raises ValueError where its structs are not those above."""
    library = ctypes.CDLL(str(path.resolve()))  # symbols stay apart from those of other builds
    if not hasattr(library, "tpf_sizeof"):
        raise ValueError(f"{path} does not tell the sizes of its structs: it was built before tpf_sizeof was there")
    library.tpf_sizeof.argtypes, library.tpf_sizeof.restype = [ctypes.c_char_p], ctypes.c_int64
    for name, struct in STRUCTS.items():
        theirs, ours = library.tpf_sizeof(name.encode()), ctypes.sizeof(struct)
        if theirs != ours:
            version = library.tpf_version()
            raise ValueError(
                f"{name} has {theirs} bytes in {path} (version {version}) and {ours} in {__file__}: "
                f"compare it with the tools of its own checkout"
            )
    for name, arguments in FUNCTIONS.items():
        if not hasattr(library, name):
            raise ValueError(f"{path} has no {name}: it was built without CUDA kernels")
        getattr(library, name).argtypes = arguments
    return library
