// Arguments and results as the dispatcher has them on its stack. Only with torch at hand (torch_api.h: have_torch).
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "team.h"
#include "torch_api.h"

namespace tpf {

constexpr int64_t kItemBytes[5] = {2, 2, 4, 1, 1};  // by tpf_dtype

template <typename Handle>
Handle* handle(Value value) {
  return reinterpret_cast<Handle*>(value);
}

// A `Tensor?`: its value lies on the heap.
inline Tensor optional_tensor(Value value) {
  const Value* inner = handle<Value>(value);
  return inner == nullptr ? nullptr : handle<AtenTensorOpaque>(*inner);
}

inline std::string_view string(Value value) {
  const char* characters = nullptr;
  size_t length = 0;
  torch.torch_string_c_str(handle<StringOpaque>(value), &characters);
  torch.torch_string_length(handle<StringOpaque>(value), &length);
  return {characters, length};
}

// What is added to a mean of squares: False where that would be nothing, or too much, in fp32.
inline bool read_eps(Value value, float* eps) {
  *eps = static_cast<float>(std::bit_cast<double>(value));
  return *eps > 0 && std::isfinite(*eps);
}

// What is added to a norm's weight.
inline bool read_weight_offset(Value value, float* offset) {
  *offset = static_cast<float>(std::bit_cast<double>(value));
  return std::isfinite(*offset);
}

inline bool boolean(Value value) { return (value & 0xff) != 0; }

// What a kernel asks of a tensor.
struct View {
  // False where torch cannot say, or the tensor is not contiguous.
  bool read(Tensor tensor) {
    bool contiguous = false;
    return read_strided(tensor) && torch.aoti_torch_is_contiguous(tensor, &contiguous) == 0 && contiguous;
  }
  // The same of one whose rows and columns may lie apart.
  bool read_strided(Tensor tensor) {
    int64_t *sizes = nullptr, *strides = nullptr;
    int32_t torch_dtype = -1;
    bool defined = false;  // None is not. Asked for anything else, torch 2.11 logs a backtrace.
    if (torch.aoti_torch_is_defined(tensor, &defined) || !defined) return false;
    if (torch.aoti_torch_get_dim(tensor, &dim) || torch.aoti_torch_get_sizes(tensor, &sizes) ||
        torch.aoti_torch_get_strides(tensor, &strides) || torch.aoti_torch_get_dtype(tensor, &torch_dtype) ||
        torch.aoti_torch_get_device_type(tensor, &device_type) ||
        torch.aoti_torch_get_device_index(tensor, &device_index) || torch.aoti_torch_get_data_ptr(tensor, &data)) {
      return false;
    }
    if (dim != 1 && dim != 2) return false;
    row_stride = dim == 2 ? strides[0] : 0;
    column_stride = strides[dim - 1];
    rows = dim == 2 ? sizes[0] : 1;
    columns = sizes[dim - 1];
    for (dtype = 0; dtype < 5; ++dtype) {
      if (torch_dtypes[dtype] == torch_dtype) return has_memory(tensor);
    }
    return false;
  }
  // False where its storage has been freed, or ends before it.
  bool has_memory(Tensor tensor) const {
    if (rows == 0 || columns == 0) return true;
    int64_t bytes = 0, offset = 0;
    if (torch.aoti_torch_get_storage_size(tensor, &bytes) || torch.aoti_torch_get_storage_offset(tensor, &offset)) {
      return false;
    }
    return (offset + (rows - 1) * row_stride + (columns - 1) * column_stride + 1) * kItemBytes[dtype] <= bytes;
  }
  bool like(const View& other) const {
    return dtype == other.dtype && device_type == other.device_type && device_index == other.device_index;
  }
  bool aligned() const { return reinterpret_cast<Address>(data) % 16 == 0; }
  int64_t row_bytes() const { return columns * kItemBytes[dtype]; }

  void* data = nullptr;
  int64_t dim = 0, rows = 0, columns = 0, row_stride = 0, column_stride = 0;
  int dtype = 0;  // a tpf_dtype
  int32_t device_type = 0, device_index = 0;
};

// A kernel's results; freed where it gives up.
class Results {
 public:
  Results() = default;
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;
  ~Results() { clear(); }
  void clear() {
    while (count_ > 0) torch.aoti_torch_delete_tensor_object(tensors_[--count_]);
  }
  void take(Tensor tensor) { tensors_[count_++] = tensor; }
  Tensor release_last() { return tensors_[--count_]; }
  void drop_last() { torch.aoti_torch_delete_tensor_object(tensors_[--count_]); }
  Tensor operator[](int index) const { return tensors_[index]; }

  // One more, uninitialised, [rows, columns] of a dtype, on the device of `like`. Null where there is no memory.
  bool add(void** data, const View& like, int64_t rows, int64_t columns, int dtype) {
    return make(data, like, rows, columns, std::max<int64_t>(columns, 1), 1, dtype);
  }

  // The same of fp32, column-major with columns `pitch` apart.
  bool add_column_major(void** data, const View& like, int64_t rows, int64_t columns, int64_t pitch) {
    return make(data, like, rows, columns, 1, pitch, TPF_F32);
  }

  // Onto the stack, which owns them from then on.
  void move_to(Value* stack) {
    for (int i = 0; i < count_; ++i) stack[i] = reinterpret_cast<Value>(tensors_[i]);
    count_ = 0;
  }

 private:
  // Unlike new_empty it goes to the dispatcher once. Its strides are new_empty's.
  bool make(void** data, const View& like, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
            int dtype) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
    Tensor* const tensor = &tensors_[count_];
    return torch.aoti_torch_empty_strided(2, sizes, strides, torch_dtypes[dtype], like.device_type, like.device_index,
                                          tensor) == 0 &&
           ++count_ && torch.aoti_torch_get_data_ptr(*tensor, data) == 0;
  }

  std::array<Tensor, 5> tensors_ = {};
  int count_ = 0;
};

}  // namespace tpf
