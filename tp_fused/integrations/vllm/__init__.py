"""DeepSeek-V2, V3 and V3.2 in vLLM, with the residual kept scattered from layer to layer, as a plugin of vLLM.

    TP_FUSED_VLLM=1 vllm serve ... --tensor-parallel-size 8 -cc.mode=0

Off unless TP_FUSED_VLLM=1. vLLM builds and loads its model; what lies between the blocks is replaced: of V2 and V3 in
model.py, of V3.2 in sequence_parallel.py.
"""

import logging
import os

logger = logging.getLogger(__name__)

RELEASES = ("0.32.0",)
_MODELS = {
    "model": ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    "deepseek_v32": ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
}


def plugin() -> None:
    """The entry point of the group `vllm.general_plugins`: run in every process, before there are ranks."""
    if os.environ.get("TP_FUSED_VLLM") != "1":
        return
    import vllm

    if vllm.__version__.split("+")[0] not in RELEASES:
        logger.warning("tp_fused serves vLLM %s, this is %s: left as it is", ", ".join(RELEASES), vllm.__version__)
        return
    for module, models in _MODELS.items():
        for model in models:
            vllm.ModelRegistry.register_model(model, f"{__name__}.{module}:{model}")
