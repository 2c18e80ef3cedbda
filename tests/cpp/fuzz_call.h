// A random call: what the fuzzer has chosen, and memory of exactly its size.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "fuzz_numbers.h"
#include "tp_fused.h"

// What the fuzzer has chosen; zeros when it has said no more.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint64_t bits(int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes && size_ > 0; ++i, ++data_, --size_) value = value << 8 | *data_;
    return value;
  }
  bool yes(int one_in = 2) { return bits(1) % static_cast<unsigned>(one_in) == 1; }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits(4) % static_cast<uint64_t>(high - low + 1));
  }
  template <typename T>
  T of(std::initializer_list<T> values) {
    return values.begin()[bits(1) % values.size()];
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// Memory that ends where it ends. What is to be read may begin at any byte.
class Block {
 public:
  explicit Block(int64_t bytes, int shift = 0) : memory_(new char[bytes + shift]), bytes_(bytes), shift_(shift) {
    std::memset(memory_.get(), 0xff, static_cast<size_t>(bytes + shift));
  }
  char* data() const { return memory_.get() + shift_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<char[]> memory_;
  int64_t bytes_;
  int shift_;
};

struct Call {
  tpf_op op;
  tpf_dtype dtype;
  uint32_t variant = 0;
  int64_t num_tokens;
  int32_t hidden_size;
  int32_t group_size = 128, q_columns = 0, kv_columns = 0;
  int odd_one = -1;  // this rank calls it with another token count
  float weight_offset = 0;
  bool in_place = false;      // the input is symmetric memory
  int64_t symm_offset = 0;    // there
  bool any_bits = false;      // NaN and infinity too
  int shift = 0;              // bytes between an input and an aligned address
  std::vector<Block> inputs;  // of every rank
  std::vector<Block> residuals, outputs, sums, q, scales, k_pe;
  std::unique_ptr<Block> weight, second_weight;

  bool projects() const { return op >= TPF_QKV_A_PROJ_AG && op <= TPF_QKV_A_PROJ_AG_NORM; }
  bool gathers() const { return op == TPF_ALL_GATHER_ROWS || projects(); }
  int64_t item() const { return op == TPF_QKV_A_PROJ_AG_FP8 ? 2 : bytes_of(dtype); }
  tpf_dtype stored() const { return op == TPF_QKV_A_PROJ_AG_FP8 ? TPF_BF16 : dtype; }
  int64_t row_bytes() const { return hidden_size * item(); }
  int64_t tokens(int rank) const { return num_tokens + (rank == odd_one); }
  int64_t groups() const { return (int64_t{hidden_size} + group_size - 1) / group_size; }
  bool norms() const { return op <= TPF_RS_RMSNORM_AG || op == TPF_QKV_A_PROJ_AG_NORM; }
  tpf_dtype weight_dtype() const { return (variant & TPF_FLOAT_WEIGHT) != 0 ? TPF_F32 : dtype; }
  bool column_scales() const { return (variant & TPF_COLUMN_SCALES) != 0; }
};

struct Rows {
  int64_t start, count;
};

inline Rows rows_of(int64_t num_tokens, int rank, int world_size) {
  Rows rows;
  tpf_rows_of(&rows.start, &rows.count, num_tokens, rank, world_size);
  return rows;
}

inline int64_t pitch_of(int64_t rows) { return (rows + 3) / 4 * 4; }

constexpr float kEps = 1e-5f;
constexpr int64_t kMostElements = 1 << 15;

inline Call choose_call(Choices& choices, int world_size) {
  Call call;
  call.op = choices.of({TPF_RS_RMSNORM, TPF_RS_RMSNORM_FP8, TPF_RS_RMSNORM_AG, TPF_REDUCE_SCATTER_ROWS,
                        TPF_ALL_GATHER_ROWS, TPF_QKV_A_PROJ_AG, TPF_QKV_A_PROJ_AG_FP8, TPF_QKV_A_PROJ_AG_NORM});
  call.dtype = choices.of({TPF_BF16, TPF_F16, TPF_F32});
  if (call.op == TPF_ALL_GATHER_ROWS && choices.yes()) call.dtype = choices.of({TPF_E4M3, TPF_U8});
  if (call.op == TPF_QKV_A_PROJ_AG_FP8) call.dtype = TPF_E4M3;
  call.hidden_size = static_cast<int32_t>(choices.between(1, choices.yes(8) ? 16384 : choices.yes() ? 600 : 40));
  call.num_tokens = std::min(choices.between(0, choices.yes() ? 70 : 9), kMostElements / call.hidden_size);
  const bool reduces = call.op <= TPF_RS_RMSNORM_AG || call.op == TPF_REDUCE_SCATTER_ROWS;
  if (reduces && choices.yes()) call.variant |= TPF_RESIDUAL;
  if (call.op <= TPF_RS_RMSNORM_FP8 && choices.yes(4)) call.variant |= TPF_COMPLETE;
  if (call.op == TPF_RS_RMSNORM_FP8) {
    if (choices.yes()) call.variant |= TPF_COLUMN_SCALES;
    if (choices.yes()) call.variant |= TPF_KEEP_OUTPUT;
    call.group_size = choices.yes() ? choices.of({64, 128, 1, 8, std::numeric_limits<int32_t>::max()})
                                    : static_cast<int32_t>(choices.between(1, 20000));
    call.group_size = std::max(call.group_size, call.hidden_size / 4096);
  }
  if (call.op == TPF_QKV_A_PROJ_AG_NORM) {
    call.q_columns = static_cast<int32_t>(choices.between(0, call.hidden_size));
    call.kv_columns = static_cast<int32_t>(choices.between(0, call.hidden_size - call.q_columns));
  }
  if (call.norms() && choices.yes(4)) call.variant |= TPF_FLOAT_WEIGHT;
  if (call.norms() && choices.yes(4)) call.weight_offset = choices.of({1.0f, -0.0f, 0.3f});
  if (world_size > 1 && choices.yes(16)) call.odd_one = static_cast<int>(choices.bits(1)) % world_size;
  call.in_place = !call.gathers() && choices.yes(3);
  call.any_bits = choices.yes(4);
  call.shift = static_cast<int>(choices.bits(1) % 8);
  return call;
}

// ---- memory of a call ----

inline void fill(Block& block, tpf_dtype dtype, bool any_bits, std::minstd_rand& random) {
  for (int64_t i = 0; i < block.bytes() / bytes_of(dtype); ++i) {
    if (any_bits || dtype == TPF_E4M3 || dtype == TPF_U8) {
      const auto bits = static_cast<uint32_t>(random() ^ random() << 13);
      std::memcpy(block.data() + i * bytes_of(dtype), &bits, static_cast<size_t>(bytes_of(dtype)));
    } else {
      store(block.data(), i, static_cast<float>(static_cast<int>(random() % 17) - 8), dtype);
    }
  }
}

inline void make_memory(Call& call, int world_size, Choices& choices) {
  std::minstd_rand random(static_cast<uint32_t>(choices.bits(2)) + 1);
  const auto filled = [&](int64_t bytes, int shift, bool any_bits) {
    Block block(bytes, shift);
    fill(block, call.stored(), any_bits, random);
    return block;
  };
  const auto filled_weight = [&](int64_t columns) {
    Block block(columns * bytes_of(call.weight_dtype()), call.shift);
    fill(block, call.weight_dtype(), call.any_bits, random);
    return std::make_unique<Block>(std::move(block));
  };
  call.symm_offset = call.in_place ? choices.between(0, 40) : 0;
  call.any_bits |= call.symm_offset % call.item() != 0;
  for (int rank = 0; rank < world_size; ++rank) {
    const int64_t tokens = call.tokens(rank), rows = rows_of(tokens, rank, world_size).count;
    const int64_t all = tokens * call.row_bytes(), own = rows * call.row_bytes();
    call.inputs.push_back(filled((call.gathers() ? own : all) + call.symm_offset, call.shift, call.any_bits));
    call.residuals.push_back(filled(own, call.shift, call.any_bits));
    const bool whole = call.gathers() || call.op == TPF_RS_RMSNORM_AG;
    int64_t first = whole ? all : own;
    if (call.op == TPF_QKV_A_PROJ_AG_NORM) first = tokens * call.q_columns * call.item();
    if (call.op == TPF_RS_RMSNORM_FP8 && (call.variant & TPF_KEEP_OUTPUT) == 0) first = 0;
    call.outputs.emplace_back(first);
    call.sums.emplace_back(call.op == TPF_QKV_A_PROJ_AG_NORM ? tokens * call.kv_columns * call.item() : own);
    call.k_pe.emplace_back(tokens * (call.hidden_size - call.q_columns - call.kv_columns) * call.item());
    call.q.emplace_back(rows * call.hidden_size);
    call.scales.emplace_back(call.groups() * (call.column_scales() ? pitch_of(rows) : rows) * 4);
  }
  const bool latent = call.op == TPF_QKV_A_PROJ_AG_NORM;
  call.weight = filled_weight(latent ? call.q_columns : call.hidden_size);
  call.second_weight = filled_weight(call.kv_columns);
}
