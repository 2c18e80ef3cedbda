// What must come out of a random call, by a simple loop.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fuzz_call.h"

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void wrong(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "wrong: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::abort();
}

struct Checker {
  const Call& call;
  int rank, world_size;
  Rows own = rows_of(call.num_tokens, rank, world_size);

  void same(const char* what, int64_t element, float seen, float expected) const {
    if (std::isnan(seen) && std::isnan(expected)) return;
    if (std::bit_cast<uint32_t>(seen) == std::bit_cast<uint32_t>(expected)) return;
    wrong("op %d, dtype %d, %lld tokens of %d, variant %u, rank %d of %d: %s[%lld] is %g instead of %g", call.op,
          call.dtype, static_cast<long long>(call.num_tokens), call.hidden_size, call.variant, rank, world_size, what,
          static_cast<long long>(element), seen, expected);
  }

  // The sum of a row that rank `owner` has, as stored.
  std::vector<float> sum(int owner, int64_t row) const {
    const int64_t start = rows_of(call.num_tokens, owner, world_size).start, hidden = call.hidden_size;
    std::vector<float> sums(hidden);
    for (int64_t c = 0; c < hidden; ++c) {
      const int64_t place = (start + row) * hidden + c;
      const auto of = [&](int r) { return load(call.inputs[r].data() + call.symm_offset, place, call.dtype); };
      float total = of((call.variant & TPF_COMPLETE) != 0 ? owner : 0);
      for (int r = 1; r < world_size && (call.variant & TPF_COMPLETE) == 0; ++r) total += of(r);
      if ((call.variant & TPF_RESIDUAL) != 0) total += load(call.residuals[owner].data(), row * hidden + c, call.dtype);
      sums[c] = rounded(total, call.dtype);
    }
    return sums;
  }

  std::vector<float> norm(const std::vector<float>& row, const Block& weight) const {
    double squares = 0;
    for (const float x : row) squares += double{x} * x;
    const float scale = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(row.size())) + kEps);
    std::vector<float> out(row.size());
    for (size_t c = 0; c < row.size(); ++c) {
      float factor = load(weight.data(), static_cast<int64_t>(c), call.weight_dtype());
      if (call.weight_offset != 0) factor += call.weight_offset;
      out[c] = rounded(row[c] * scale * factor, call.dtype);
    }
    return out;
  }

  void row(const char* what, const Block& block, int64_t row, const std::vector<float>& expected) const {
    for (size_t c = 0; c < expected.size(); ++c) {
      const int64_t place = row * static_cast<int64_t>(expected.size()) + static_cast<int64_t>(c);
      same(what, place, load(block.data(), place, call.dtype), expected[c]);
    }
  }

  void quantized(int64_t row, const std::vector<float>& values) const {
    const auto* scales = reinterpret_cast<const float*>(call.scales[rank].data());
    const int64_t pitch = pitch_of(own.count);
    for (int64_t g = 0; g < call.groups(); ++g) {
      const float scale = call.column_scales() ? scales[row + g * pitch] : scales[row * call.groups() + g];
      const int64_t begin = g * call.group_size, end = std::min<int64_t>(begin + call.group_size, call.hidden_size);
      float amax = 0;
      for (int64_t c = begin; c < end; ++c) amax = std::max(amax, std::fabs(values[c]));
      same("scale", g, scale, amax / 448.0f);
      for (int64_t c = begin; c < end; ++c) {
        const float q = e4m3(static_cast<uint8_t>(call.q[rank].data()[row * call.hidden_size + c]));
        const float exact = amax == 0 ? 0 : values[c] / amax * 448.0f;
        const float step = std::max(std::fabs(exact) / 16, 1.0f / 1024);
        if (!(std::fabs(q - exact) <= step * 1.001f)) same("q", c, q, exact);
      }
    }
  }

  void reduced() const {
    for (int64_t r = 0; r < own.count; ++r) {
      const std::vector<float> sums = sum(rank, r);
      row("sum", call.sums[rank], r, sums);
      // What is not finite has its own rules; that it stays within its memory is what counts then.
      if (call.any_bits || call.op == TPF_REDUCE_SCATTER_ROWS || call.op == TPF_RS_RMSNORM_AG) continue;
      const std::vector<float> normed = norm(sums, *call.weight);
      if (call.op == TPF_RS_RMSNORM || (call.variant & TPF_KEEP_OUTPUT) != 0) {
        row("output", call.outputs[rank], r, normed);
      }
      if (call.op == TPF_RS_RMSNORM_FP8) quantized(r, normed);
    }
    if (call.any_bits || call.op != TPF_RS_RMSNORM_AG) return;
    for (int owner = 0; owner < world_size; ++owner) {
      const Rows theirs = rows_of(call.num_tokens, owner, world_size);
      for (int64_t r = 0; r < theirs.count; ++r) {
        row("output", call.outputs[rank], theirs.start + r, norm(sum(owner, r), *call.weight));
      }
    }
  }

  void gathered() const {
    for (int owner = 0; owner < world_size; ++owner) {
      const Rows theirs = rows_of(call.num_tokens, owner, world_size);
      for (int64_t r = 0; r < theirs.count; ++r) {
        const char* source = call.inputs[owner].data() + r * call.row_bytes();
        if (call.op != TPF_QKV_A_PROJ_AG_NORM) {
          const char* seen = call.outputs[rank].data() + (theirs.start + r) * call.row_bytes();
          if (std::memcmp(seen, source, static_cast<size_t>(call.row_bytes())) != 0) same("row", r, 0, 1);
        } else if (!call.any_bits) {
          split(source, theirs.start + r);
        }
      }
    }
  }

  void split(const char* source, int64_t token) const {
    const int32_t ends[4] = {0, call.q_columns, call.q_columns + call.kv_columns, call.hidden_size};
    std::vector<float> parts[3];
    for (int part = 0; part < 3; ++part) {
      for (int c = ends[part]; c < ends[part + 1]; ++c) parts[part].push_back(load(source, c, call.dtype));
    }
    row("q_a", call.outputs[rank], token, norm(parts[0], *call.weight));
    row("kv_a", call.sums[rank], token, norm(parts[1], *call.second_weight));
    row("k_pe", call.k_pe[rank], token, parts[2]);
  }
};
