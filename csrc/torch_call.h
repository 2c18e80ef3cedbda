// What a kernel of torch's dispatcher asks of a call before it serves it: just what checks.py asks, which has the words
// for it. tests/test_one_road.py compares the two.
#pragma once
#include <optional>
#include <string_view>
#include <utility>

#include "partition.h"
#include "team.h"
#include "torch_api.h"
#include "torch_values.h"

// A CUDA op of the C API. A build without nvcc has none, and no workspace on a card for which it could be called.
#if TPF_HAS_CUDA
#define TPF_CUDA_OP(op) op
#else
#define TPF_CUDA_OP(op) static_cast<decltype(&op)>(nullptr)
#endif

namespace tpf {

// Has Python write the product of fp8 rows into `out`, [rows, columns] of bf16: torch has no C function for it.
bool project_fp8(Tensor rows, Tensor scale, Tensor weight, Tensor weight_scale, Tensor out, int max_ctas);

// The workspace that serves a group's tensors, on the card or on the host.
std::optional<Workspace> find_workspace(std::string_view group_name, bool on_cuda);

// What the ops share. `read` says whether all is in order.
struct Call {
  bool read(Value tensor, Value group_name, int largest_dtype) {
    input_tensor = handle<AtenTensorOpaque>(tensor);
    return input.read(input_tensor) && input.dim == 2 && input.dtype <= largest_dtype && find(string(group_name)) &&
           workspace.caller->admit();
  }
  // Columns reach the launchers as 32-bit integers.
  bool fits(int64_t num_tokens, int64_t columns, int dtype) const {
    return num_tokens >= 0 && num_tokens <= workspace.max_num_tokens && std::in_range<int32_t>(columns) &&
           columns * kItemBytes[dtype] <= workspace.row_bytes;
  }
  // Whether it may be the weight of a norm of rows of this dtype: of the same, or fp32.
  bool weighs(const View& weight, int rows_dtype) const {
    return weight.dim == 1 && weight.device_type == input.device_type && weight.device_index == input.device_index &&
           (weight.dtype == rows_dtype || weight.dtype == TPF_F32) && (!on_cuda() || weight.aligned());
  }
  Rows own_rows(int64_t num_tokens) const { return rows_of(num_tokens, team()->rank, team()->world_size); }
  const tpf_team* team() const { return workspace.team->get(); }
  tpf_dtype dtype() const { return static_cast<tpf_dtype>(input.dtype); }
  bool on_cuda() const { return workspace.team->on_cuda(); }

  // One of the two launches. False where the workspace has faulted, before or in this call.
  bool run(auto&& cuda, auto&& cpu) const {
    if (workspace.team->fault_status() != TPF_OK) return false;
    if (on_cuda()) {
      void* stream = nullptr;
      return torch.aoti_torch_get_current_cuda_stream(team()->device, &stream) == 0 &&
             checked(workspace.team->follow_stream(stream)) == TPF_OK && checked(cuda(stream)) == TPF_OK;
    }
    // Waits for peers, which may be threads of this process: torch has let go of the interpreter's lock.
    return checked(cpu()) == TPF_OK;
  }

  Tensor input_tensor = nullptr;
  View input;
  Workspace workspace;

 private:
  bool find(std::string_view group_name) {
    auto found = find_workspace(group_name, input.device_type == torch.aoti_torch_device_type_cuda());
    if (!found) return false;
    workspace = std::move(*found);
    return !on_cuda() || input.device_index == team()->device;
  }
};

// launch(one of the two, what else it takes)
bool run(const Call& call, auto&& launch, auto* cuda, auto* cpu) {
  return call.run([&](void* stream) { return launch(cuda, stream); }, [&] { return launch(cpu); });
}

}  // namespace tpf
