// The ops: arguments are checked, outputs allocated and the op launched, without the interpreter. What is not in order,
// what has faulted and what the reference backend serves goes on to Python with the very same arguments (ops.py). It
// has the words, or raises an error that says that it finds nothing wrong.
#include "torch_ops.h"

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "torch_reduction.h"
#include "torch_served.h"

namespace py = pybind11;

namespace tpf {
namespace {

// ---- workspaces by the name of their group ----

std::mutex workspaces_mutex;
std::vector<std::pair<std::string, Workspace>> workspaces;  // few

}  // namespace

// ---- the ops ----

bool rs_rmsnorm(const Value* arguments, Results* results) {
  ReduceCall in;
  if (!in.read(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[6])) return false;
  if (boolean(arguments[5])) in.variant |= TPF_COMPLETE;
  void *output, *residual_out;
  for (void** data : {&output, &residual_out}) {
    if (!results->add(data, in.input, in.own_rows().count, in.input.columns, in.dtype())) return false;
  }
  const Input symm(*in.workspace.team, in.input.data);
  const auto launch = [&](auto* op, auto... last) {
    return op(output, residual_out, in.input.data, symm.get(), in.residual, in.weight, in.team(), in.input.rows,
              in.input.columns, in.dtype(), in.eps, in.weight_offset, in.variant, last...);
  };
  return run(in, launch, TPF_CUDA_OP(tpf_rs_rmsnorm_cuda), tpf_rs_rmsnorm_cpu);
}

bool reduce_and_gather(const ReduceCall& in, Results* results) {
  void *output, *residual_out;
  if (!results->add(&output, in.input, in.input.rows, in.input.columns, in.dtype())) return false;
  if (!results->add(&residual_out, in.input, in.own_rows().count, in.input.columns, in.dtype())) return false;
  const Input symm(*in.workspace.team, in.input.data);
  const auto launch = [&](auto* op, auto... last) {
    return op(output, residual_out, in.input.data, symm.get(), in.residual, in.weight, in.team(), in.input.rows,
              in.input.columns, in.dtype(), in.eps, in.weight_offset, in.variant, last...);
  };
  return run(in, launch, TPF_CUDA_OP(tpf_rs_rmsnorm_ag_cuda), tpf_rs_rmsnorm_ag_cpu);
}

bool all_gather_rows(const Value* arguments, Results* results) {
  Call in;
  const auto num_tokens = static_cast<int64_t>(arguments[1]);
  if (!in.read(arguments[0], arguments[2], TPF_U8) || !in.fits(num_tokens, in.input.columns, in.dtype())) return false;
  if (in.input.rows != in.own_rows(num_tokens).count) return false;
  void* output;
  if (!results->add(&output, in.input, num_tokens, in.input.columns, in.dtype())) return false;
  const auto launch = [&](auto* op, auto... last) {
    return op(output, in.input.data, in.team(), num_tokens, in.input.columns, in.dtype(), last...);
  };
  return run(in, launch, TPF_CUDA_OP(tpf_all_gather_rows_cuda), tpf_all_gather_rows_cpu);
}

bool rs_rmsnorm_ag(const Value* arguments, Results* results) {
  ReduceCall in;
  if (!in.read(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5])) return false;
  return reduce_and_gather(in, results);
}

bool reduce_scatter_rows(const Value* arguments, Results* results) {
  ReduceCall in;
  if (!in.read(arguments[0], arguments[2], arguments[1])) return false;
  void* output;
  if (!results->add(&output, in.input, in.own_rows().count, in.input.columns, in.dtype())) return false;
  const Input symm(*in.workspace.team, in.input.data);
  const auto launch = [&](auto* op, auto... last) {
    return op(output, in.input.data, symm.get(), in.residual, in.team(), in.input.rows, in.input.columns, in.dtype(),
              in.variant, last...);
  };
  return run(in, launch, TPF_CUDA_OP(tpf_reduce_scatter_rows_cuda), tpf_reduce_scatter_rows_cpu);
}

namespace {

// ---- the dispatcher's side ----

struct Op {
  tpf_op number;
  const char* name;
  std::string_view arguments;  // as in the schema: each a (T)ensor, Tensor (?), (s)tring, (f)loat, (i)nt or (b)ool
  bool (*serve)(const Value* arguments, Results* results);
};

constexpr auto kSeveralOps = static_cast<tpf_op>(0);  // what ranks announce are the ops it is made of
constexpr Op kOps[] = {
    {TPF_RS_RMSNORM, "rs_rmsnorm", "T?Tfsbf", rs_rmsnorm},
    {TPF_RS_RMSNORM_FP8, "rs_rmsnorm_fp8", "T?Tfsisbbfb", rs_rmsnorm_fp8},
    {TPF_RS_RMSNORM_AG, "rs_rmsnorm_ag", "T?Tfsf", rs_rmsnorm_ag},
    {TPF_REDUCE_SCATTER_ROWS, "reduce_scatter_rows", "Ts?", reduce_scatter_rows},
    {TPF_ALL_GATHER_ROWS, "all_gather_rows", "Tis", all_gather_rows},
    {TPF_QKV_A_PROJ_AG, "qkv_a_proj_ag", "TTis?b", qkv_a_proj_ag},
    {TPF_QKV_A_PROJ_AG_FP8, "qkv_a_proj_ag_fp8", "TTTTisb", qkv_a_proj_ag_fp8},
    {TPF_QKV_A_PROJ_AG_NORM, "qkv_a_proj_ag_norm", "TTTTfisfb", qkv_a_proj_ag_norm},
    {TPF_QKV_A_PROJ_AG_NORM_FP8, "qkv_a_proj_ag_norm_fp8", "TTTTTTfisbsbb", qkv_a_proj_ag_norm_fp8},
    {kSeveralOps, "rs_rmsnorm_ag_fp8", "T?Tfsisbfb", rs_rmsnorm_ag_fp8},
    {kSeveralOps, "mla_prologue", "T?TTTTfsb", mla_prologue},
    {kSeveralOps, "mla_prologue_fp8", "T?TTTTTfsbsbb", mla_prologue_fp8},
};

// A call's arguments, which the stack owns. Frees what has not been taken off it, also where an exception passes.
struct Arguments {
  std::string_view kinds;
  Value* stack;

  ~Arguments() {
    for (size_t i = 0; i < kinds.size(); ++i) {
      if (kinds[i] == 'T' && stack[i] != 0) torch.aoti_torch_delete_tensor_object(handle<AtenTensorOpaque>(stack[i]));
      if (kinds[i] == 's') torch.torch_delete_string(handle<StringOpaque>(stack[i]));
      if (kinds[i] == '?') {
        if (Tensor tensor = optional_tensor(stack[i])) torch.aoti_torch_delete_tensor_object(tensor);
        delete handle<Value>(stack[i]);
      }
    }
  }
};

// What ops.py has for each op, and the functions by which torch's own generated code takes tensors to Python and back.
// Never destroyed: an interpreter that ends has no use for that.
struct Python {
  std::array<py::object, std::size(kOps)> functions;
  py::object tensors_from_handles, handles_from_tensors;
};
Python* python = nullptr;

// Takes the tensors off the stack.
py::list take_tensors(const Arguments& call) {
  py::list handles;
  for (size_t i = 0; i < call.kinds.size(); ++i) {
    const char kind = call.kinds[i];
    Value* value = kind == 'T' ? &call.stack[i] : kind == '?' ? handle<Value>(call.stack[i]) : nullptr;
    if (value != nullptr) handles.append(py::capsule(handle<void>(std::exchange(*value, 0))));
  }
  return python->tensors_from_handles(handles);
}

// Through Python itself, not the dispatcher: C functions would be in between, which no exception passes. What Python
// raises leaves here as pybind11's error_already_set, and torch, which uses pybind11 as well, raises it to its caller.
void ask_python(size_t index, const Arguments& call, Results* results) {
  const py::gil_scoped_acquire locked;
  if (PyErr_Occurred()) throw py::error_already_set();  // what ended a wait: see interrupted
  const py::list tensors = take_tensors(call);
  py::list arguments;
  size_t next = 0;
  for (size_t i = 0; i < call.kinds.size(); ++i) {
    const char kind = call.kinds[i];
    const Value value = call.stack[i];
    if (kind == 'T' || (kind == '?' && value != 0))
      arguments.append(tensors[next++]);
    else if (kind == '?')
      arguments.append(py::none());
    else if (kind == 's')
      arguments.append(string(value));
    else if (kind == 'f')
      arguments.append(std::bit_cast<double>(value));
    else if (kind == 'i')
      arguments.append(static_cast<int64_t>(value));
    else
      arguments.append(boolean(value));
  }
  const py::object result = python->functions[index](*arguments);
  const py::list made = py::isinstance<py::tuple>(result) ? py::list(result) : py::list(py::make_tuple(result));
  for (const py::handle tensor : py::list(python->handles_from_tensors(made))) {
    results->take(static_cast<Tensor>(py::reinterpret_borrow<py::capsule>(tensor).get_pointer()));
  }
}

template <size_t kIndex>
void kernel(Value* stack, uint64_t /* num_arguments */, uint64_t /* num_results */) {
  Results results;
  {
    const Arguments call = {kOps[kIndex].arguments, stack};
    if (!kOps[kIndex].serve(stack, &results)) {
      results.clear();
      ask_python(kIndex, call, &results);
    }
  }
  results.move_to(stack);
}

template <size_t... kIndices>
constexpr std::array<Kernel*, sizeof...(kIndices)> kernels(std::index_sequence<kIndices...>) {
  return {kernel<kIndices>...};
}
constexpr auto kKernels = kernels(std::make_index_sequence<std::size(kOps)>());

// Their forms for a single tensor leak it.
constexpr const char* kTensorsFromHandles = "alloc_tensors_by_stealing_from_void_ptrs";
constexpr const char* kHandlesFromTensors = "unsafe_alloc_void_ptrs_from_tensors";

std::string missing_in_python() {
  if (python != nullptr) return "";
  const py::object aoti = py::getattr(py::module_::import("torch._C"), "_aoti", py::none());
  for (const char* name : {kTensorsFromHandles, kHandlesFromTensors}) {
    if (!py::hasattr(aoti, name)) return std::string("torch._C._aoti.") + name;
  }
  python = new Python{{}, aoti.attr(kTensorsFromHandles), aoti.attr(kHandlesFromTensors)};
  return "";
}

}  // namespace

bool project_fp8(Tensor rows, Tensor scale, Tensor weight, Tensor weight_scale, Tensor out, int max_ctas) {
  const py::gil_scoped_acquire locked;
  py::list handles;
  for (Tensor tensor : {rows, scale, weight, weight_scale, out}) {
    Tensor another = nullptr;  // Python's own
    if (torch.aoti_torch_new_tensor_handle(tensor, &another) != 0) return false;
    handles.append(py::capsule(static_cast<void*>(another)));
  }
  py::module_::import("tp_fused.native").attr("project_fp8")(*python->tensors_from_handles(handles), max_ctas);
  return true;
}

std::optional<Workspace> find_workspace(std::string_view group_name, bool on_cuda) {
  const std::lock_guard lock(workspaces_mutex);
  for (const auto& [name, workspace] : workspaces) {
    if (name == group_name && workspace.team->on_cuda() == on_cuda) return workspace;
  }
  return std::nullopt;
}

void serve(const std::string& group_name, const Workspace& workspace) {
  // By the name that graphs have traced on this rank, too (compiled.py: pin). Another rank's is not found here.
  const tpf_team& team = *workspace.team->get();
  const std::string pinned = group_name + '#' + std::to_string(team.rank) + '/' + std::to_string(team.world_size);
  const std::lock_guard lock(workspaces_mutex);
  // A child that was forked has its parent's workspaces here, and may make one of the same name.
  std::erase_if(workspaces, [&](const auto& entry) {
    return (entry.first == group_name || entry.first == pinned) &&
           entry.second.team->on_cuda() == workspace.team->on_cuda();
  });
  workspaces.emplace_back(group_name, workspace);
  workspaces.emplace_back(pinned, workspace);
}

void forget(const Team& team) {
  const std::lock_guard lock(workspaces_mutex);
  std::erase_if(workspaces, [&](const auto& entry) { return entry.second.team.get() == &team; });
}

std::map<int, std::string> op_names() {
  std::map<int, std::string> names;
  for (const Op& op : kOps) {
    if (op.number != kSeveralOps) names.emplace(op.number, op.name);
  }
  return names;
}

void register_kernel(const std::string& name, const std::string& key, const std::string& kinds,
                     const py::function& function) {
  std::string missing = missing_in_torch();
  if (missing.empty() && key == "CUDA") missing = missing_in_torch_cuda();
  if (missing.empty()) missing = missing_in_python();
  if (!missing.empty()) {
    const auto version = py::str(py::module_::import("torch").attr("__version__")).cast<std::string>();
    throw py::import_error("tp_fused needs torch 2.10 or newer: torch " + version + " has no " + missing);
  }
  const auto* op = std::find_if(std::begin(kOps), std::end(kOps), [&](const Op& op) { return name == op.name; });
  if (op == std::end(kOps) || kinds != op->arguments) {
    throw py::import_error("no native kernel takes what the schema of tp_fused::" + name + " says: " + kinds);
  }
  const size_t index = op - kOps;
  python->functions[index] = function;
  TorchLibraryOpaque* library = nullptr;  // stays, as the op does
  if (torch.aoti_torch_library_init_impl("tp_fused", key.c_str(), "csrc/torch_ops.cpp", __LINE__, &library) != 0 ||
      torch.torch_library_impl(library, op->name, kKernels[index], kTorchVersion) != 0) {
    throw py::import_error("torch does not take the native kernel of tp_fused::" + name + " for " + key);
  }
}

}  // namespace tpf
