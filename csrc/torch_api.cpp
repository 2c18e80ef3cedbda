#include "torch_api.h"

#include <dlfcn.h>

#include <string>
#include <type_traits>
#include <utility>

#include "tp_fused.h"

namespace tpf {

TorchApi torch;
int32_t torch_dtypes[5];

namespace {

std::string look_up(const char* library, auto&&... functions) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return library;
  std::string missing;
  const auto found = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(handle, name));
    if (*function == nullptr) missing = name;
    return *function != nullptr;
  };
  (found(functions.first, functions.second) && ...);
  return missing;
}

}  // namespace

#define TPF_TORCH_ENTRY(name, parameters) , std::pair(#name, &torch.name)

const std::string& missing_in_torch() {
  static const std::string missing = [] {
    const std::string name = look_up("libtorch_cpu.so" TPF_TORCH_FUNCTIONS(TPF_TORCH_ENTRY));
    if (!name.empty()) return name;
    torch_dtypes[TPF_BF16] = torch.aoti_torch_dtype_bfloat16();
    torch_dtypes[TPF_F16] = torch.aoti_torch_dtype_float16();
    torch_dtypes[TPF_F32] = torch.aoti_torch_dtype_float32();
    torch_dtypes[TPF_E4M3] = torch.aoti_torch_dtype_float8_e4m3fn();
    torch_dtypes[TPF_U8] = torch.aoti_torch_dtype_uint8();
    return name;
  }();
  return missing;
}

const std::string& missing_in_torch_cuda() {
  static const std::string missing = look_up("libtorch_cuda.so" TPF_TORCH_CUDA_FUNCTIONS(TPF_TORCH_ENTRY));
  return missing;
}

}  // namespace tpf
