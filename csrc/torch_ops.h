// The ops as kernels of torch's dispatcher.
#pragma once
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "team.h"

namespace tpf {

// From here on the kernels serve calls on this group with tensors where the team is, until its team is forgotten.
void serve(const std::string& group_name, const Workspace& workspace);
void forget(const Team& team);

// The names of the ops by number (tpf_op).
std::map<int, std::string> op_names();

// Registers the kernel of tp_fused::`name` for a dispatch key, "CPU" or "CUDA". `kinds` says what the op's schema takes
// (torch_ops.cpp: Op). Calls that are not plainly in order it passes on to `function`, which takes the arguments in the
// order of the schema. An ImportError says what this torch lacks, or that the schema is another one.
void register_kernel(const std::string& name, const std::string& key, const std::string& kinds,
                     const pybind11::function& function);

}  // namespace tpf
