// What the kernels in torch_ops.cpp call of PyTorch's stable C ABI (torch/csrc/inductor/aoti_torch/c/shim.h,
// .../generated/c_shim_cpu.h and c_shim_cuda.h, torch/csrc/stable/c/shim.h), looked up in the libtorch that this
// process has loaded. So the build asks for no torch and serves every torch from 2.10 on. tests/test_torch_border.py
// compares these declarations with torch's own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct StringOpaque;

namespace tpf {

using Tensor = AtenTensorOpaque*;
using Value = uint64_t;  // torch's StableIValue: an argument or result, by value or as a handle
using Kernel = void(Value* stack, uint64_t num_arguments, uint64_t num_results);

constexpr uint64_t kTorchVersion = 2ull << 56 | 10ull << 48;  // whose conventions for Value the kernels follow: 2.10

// X(name, parameters): they return 0 or an error. Sizes and pointers that come back are borrowed.
#define TPF_TORCH_FUNCTIONS(X)                                                                                     \
  X(aoti_torch_library_init_impl, (const char*, const char*, const char*, uint32_t, TorchLibraryOpaque**))         \
  X(torch_library_impl, (TorchLibraryOpaque*, const char*, tpf::Kernel*, uint64_t))                                \
  X(torch_string_c_str, (StringOpaque*, const char**))                                                             \
  X(torch_string_length, (StringOpaque*, size_t*))                                                                 \
  X(torch_delete_string, (StringOpaque*))                                                                          \
  X(aoti_torch_is_defined, (tpf::Tensor, bool*))                                                                   \
  X(aoti_torch_get_dim, (tpf::Tensor, int64_t*))                                                                   \
  X(aoti_torch_get_sizes, (tpf::Tensor, int64_t**))                                                                \
  X(aoti_torch_get_strides, (tpf::Tensor, int64_t**))                                                              \
  X(aoti_torch_get_dtype, (tpf::Tensor, int32_t*))                                                                 \
  X(aoti_torch_get_device_type, (tpf::Tensor, int32_t*))                                                           \
  X(aoti_torch_get_device_index, (tpf::Tensor, int32_t*))                                                          \
  X(aoti_torch_is_contiguous, (tpf::Tensor, bool*))                                                                \
  X(aoti_torch_get_data_ptr, (tpf::Tensor, void**))                                                                \
  X(aoti_torch_get_storage_size, (tpf::Tensor, int64_t*))                                                          \
  X(aoti_torch_get_storage_offset, (tpf::Tensor, int64_t*))                                                        \
  X(aoti_torch_empty_strided, (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, tpf::Tensor*))  \
  X(aoti_torch_create_tensor_from_blob,                                                                            \
    (void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t, tpf::Tensor*))            \
  X(aoti_torch__reinterpret_tensor, (tpf::Tensor, int64_t, const int64_t*, const int64_t*, int64_t, tpf::Tensor*)) \
  X(aoti_torch_new_tensor_handle, (tpf::Tensor, tpf::Tensor*))                                                     \
  X(aoti_torch_copy_, (tpf::Tensor, tpf::Tensor, int32_t))                                                         \
  X(aoti_torch_delete_tensor_object, (tpf::Tensor))                                                                \
  X(aoti_torch_cpu_mm_out, (tpf::Tensor, tpf::Tensor, tpf::Tensor))                                                \
  X(aoti_torch_cpu_addmm_out, (tpf::Tensor, tpf::Tensor, tpf::Tensor, tpf::Tensor, double, double))                \
  X(aoti_torch_device_type_cuda, ())                                                                               \
  X(aoti_torch_dtype_bfloat16, ())                                                                                 \
  X(aoti_torch_dtype_float16, ())                                                                                  \
  X(aoti_torch_dtype_float32, ())                                                                                  \
  X(aoti_torch_dtype_float8_e4m3fn, ())                                                                            \
  X(aoti_torch_dtype_uint8, ())

// In a torch with CUDA.
#define TPF_TORCH_CUDA_FUNCTIONS(X)                                  \
  X(aoti_torch_get_current_cuda_stream, (int32_t, void**))           \
  X(aoti_torch_cuda_mm_out, (tpf::Tensor, tpf::Tensor, tpf::Tensor)) \
  X(aoti_torch_cuda_addmm_out, (tpf::Tensor, tpf::Tensor, tpf::Tensor, tpf::Tensor, double, double))

struct TorchApi {
#define TPF_TORCH_MEMBER(name, parameters) int32_t(*name) parameters = nullptr;
  TPF_TORCH_FUNCTIONS(TPF_TORCH_MEMBER)
  TPF_TORCH_CUDA_FUNCTIONS(TPF_TORCH_MEMBER)
#undef TPF_TORCH_MEMBER
};

extern TorchApi torch;
extern int32_t torch_dtypes[5];  // torch's numbers, by tpf_dtype

// Look the functions up at their first call, and say what is missing: a function or library, or nothing.
const std::string& missing_in_torch();
const std::string& missing_in_torch_cuda();

}  // namespace tpf
