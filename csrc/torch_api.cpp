#include "torch_api.h"

#include <dlfcn.h>

#include <utility>

#include "tp_fused.h"

namespace tpf {

TorchApi torch;
int32_t torch_dtypes[5];

namespace {

bool look_up(const char* library, auto&&... functions) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return false;
  const auto found = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(handle, name));
    return *function != nullptr;
  };
  return (found(functions.first, functions.second) && ...);
}

}  // namespace

#define TPF_TORCH_ENTRY(name, parameters) , std::pair(#name, &torch.name)

bool have_torch() {
  static const bool have = [] {
    if (!look_up("libtorch_cpu.so" TPF_TORCH_FUNCTIONS(TPF_TORCH_ENTRY))) return false;
    torch_dtypes[TPF_BF16] = torch.aoti_torch_dtype_bfloat16();
    torch_dtypes[TPF_F16] = torch.aoti_torch_dtype_float16();
    torch_dtypes[TPF_F32] = torch.aoti_torch_dtype_float32();
    torch_dtypes[TPF_E4M3] = torch.aoti_torch_dtype_float8_e4m3fn();
    torch_dtypes[TPF_U8] = torch.aoti_torch_dtype_uint8();
    return true;
  }();
  return have;
}

bool have_torch_cuda() {
  static const bool have = look_up("libtorch_cuda.so" TPF_TORCH_CUDA_FUNCTIONS(TPF_TORCH_ENTRY));
  return have;
}

}  // namespace tpf
