"""SGLang's scattered attention input (`--enable-attn-tp-input-scattered`) on tp_fused, as a plugin of SGLang.

    TP_FUSED_SGLANG=1 python -m sglang.launch_server --tp 8 --enable-attn-tp-input-scattered ...

What SGLang does in prefill between two layers, and what replaces it:

    reduce_scatter; slice the residual; add; rms_norm            rs_rmsnorm, or rs_rmsnorm_fp8 for a block-scaled layer
    fused_qkv_a_proj_with_mqa; all_gather                        qkv_a_proj_ag, or qkv_a_proj_ag_fp8
    add the residual to its rows; all_reduce; rms_norm           rs_rmsnorm_ag: the residual stays scattered

The latent norms, the attention and the MLP stay SGLang's. Off unless TP_FUSED_SGLANG=1. Every hook goes SGLang's own
way where a layer, a batch or a setting is not known to be served; what decides is the same on all ranks of the group.

session.py decides and calls the ops; communicator.py and boundary.py have the hooks of the two releases.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import pkgutil

logger = logging.getLogger(__name__)

# By release: the module here that has its hooks. Others are refused: between releases these functions change their
# arguments and what they leave summed.
RELEASES = {"0.5.6": "communicator", "0.5.23": "boundary"}

_plugged = False


def plugin() -> None:
    """The entry point of the group `sglang.srt.plugins`; may be called again, in any process."""
    global _plugged
    if _plugged or os.environ.get("TP_FUSED_SGLANG") != "1":
        return
    _plugged = True
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        version = "a checkout"
    if version not in RELEASES:
        logger.warning("tp_fused serves SGLang %s, this is %s: left as it is", " and ".join(RELEASES), version)
        return
    hooks = importlib.import_module(f".{RELEASES[version]}", __name__).HOOKS
    if importlib.util.find_spec("sglang.srt.plugins") is None:
        for target, hook in hooks.items():
            _wrap(target, hook)
        return
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    for target, hook in hooks.items():
        registry.HookRegistry.register(target, hook, registry.HookType.AROUND)


def _wrap(target: str, hook) -> None:
    """What SGLang's hook registry does with an AROUND hook on a method, for releases that have none."""
    path, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(path)
    original = owner.__dict__[name]

    @functools.wraps(original)
    def around(*arguments, **options):
        return hook(original, *arguments, **options)

    setattr(owner, name, around)
