"""Models that vLLM builds as without the plugin, after one line that says so.

DeepSeek-V3.2 and GLM-5 have layers of their own in vLLM, for CUDA and ROCm. With expert and data parallelism these keep
hidden states and residual scattered, in shares padded to one size, on which the experts' all-to-all counts; without,
they fuse the all-reduce into the norm. vLLM has no sparse attention on CPUs, where this plugin is tested.
"""

import logging

from vllm.models import deepseek_v32

logger = logging.getLogger(__name__)


def _say_so(model: str) -> None:
    logger.warning("tp_fused leaves vLLM's model as it is: %s, whose sparse attention has layers of its own", model)


class DeepseekV32ForCausalLM(deepseek_v32.DeepseekV32ForCausalLM):
    def __init__(self, *, vllm_config, prefix: str = ""):
        _say_so("DeepSeek-V3.2")
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class GlmMoeDsaForCausalLM(deepseek_v32.GlmMoeDsaForCausalLM):
    def __init__(self, *, vllm_config, prefix: str = ""):
        _say_so("GLM-5")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
