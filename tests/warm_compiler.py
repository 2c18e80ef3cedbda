"""What torch.compile does once in every process, half of it making patterns: done here for all ranks.

To be imported where ranks are forked: `pytest.mark.preload("warm_compiler")`.
"""

import torch
from compile_pass_ranks import FrontEnd, rank_of_its_own


def _program(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1)


_num_threads = torch.get_num_threads()
torch.set_num_threads(1)  # a process with threads of OpenMP is not to be forked
with rank_of_its_own():
    for _backend in (FrontEnd(), "inductor"):  # which imports more, and asks the C++ compiler what it knows
        torch.compile(_program, backend=_backend)(torch.ones(2, 3))
        torch._dynamo.reset()
torch.set_num_threads(_num_threads)
torch._dynamo.utils.counters.clear()
