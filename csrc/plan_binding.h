// _C.plan and _C.card: plans for Python.
#pragma once
#include <pybind11/pybind11.h>

namespace tpf {

void bind_plan(pybind11::module_& m);

}  // namespace tpf
