// Ranks as threads on allocated regions, through the C API: rounds of all ops, staged and in place, for ThreadSanitizer
// to watch. The threads meet nowhere but in the ops. Inputs are small integers, so sums are exact whatever is summed
// first. Exits with 1 on a wrong result or a status other than TPF_OK.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "tp_fused.h"

namespace {

constexpr int kRanks = 4;
constexpr int kHidden = 24, kQ = 7, kKv = 13;
constexpr int64_t kMaxTokens = 67;
constexpr int64_t kTokens[] = {5, 0, 67, 1, 33, 3, 4};
constexpr int64_t kSlotBytes = kMaxTokens * kHidden * sizeof(float);
constexpr float kEps = 1e-5f;

struct Memory {
  void* region[kRanks];
  std::vector<float> symmetric[kRanks];
};

float value(int round, int rank, int64_t element) { return static_cast<float>((round + 3 * rank + element) % 17 - 8); }

class Rank {
 public:
  Rank(int rank, Memory& memory) : rank_(rank), memory_(memory) {
    team_ = {};
    team_.rank = rank;
    team_.world_size = kRanks;
    for (int r = 0; r < kRanks; ++r) team_.region[r] = memory.region[r];
    team_.slot_bytes = kSlotBytes;
    team_.timeout_ns = 20'000'000'000;
    team_.liveness_fd = team_.device = -1;
  }

  bool run(int rounds) {
    for (round_ = 0; round_ < rounds; ++round_) {
      tokens_ = kTokens[round_ % (sizeof kTokens / sizeof *kTokens)];
      tpf_rows_of(&start_, &count_, tokens_, rank_, kRanks);
      if (!one()) {
        std::fprintf(stderr, "rank %d, round %d, %lld tokens: wrong\n", rank_, round_, static_cast<long long>(tokens_));
        return false;
      }
    }
    return true;
  }

 private:
  bool one() {
    const bool in_place = round_ / 8 % 2 != 0;
    const int64_t first = round_ % 3 * kHidden;
    float* input = in_place ? memory_.symmetric[rank_].data() + first : staged_.data();
    for (int64_t i = 0; i < tokens_ * kHidden; ++i) input[i] = value(round_, rank_, i);
    tpf_symm symm = {};
    for (int r = 0; r < kRanks; ++r) symm.base[r] = memory_.symmetric[r].data();
    symm.offset = first * static_cast<int64_t>(sizeof(float));
    const bool right = call(input, in_place ? &symm : nullptr);
    // What the peers read in place is the caller's again.
    for (int64_t i = 0; i < tokens_ * kHidden; ++i) input[i] = std::numeric_limits<float>::quiet_NaN();
    return right;
  }

  bool call(const float* input, const tpf_symm* symm) {
    const auto hidden = kHidden;
    float *out = output_.data(), *sums = sums_.data();
    tpf_call gather = {};
    gather.dtype = TPF_F32;
    gather.num_tokens = tokens_;
    gather.hidden_size = gather.columns = kHidden;
    gather.source = -1;
    switch (round_ % 8) {
      case 0:
        return tpf_rs_rmsnorm_cpu(out, sums, input, symm, nullptr, weight_, &team_, tokens_, hidden, TPF_F32, kEps, 0,
                                  0) == TPF_OK &&
               reduced(sums);
      case 1:
        return tpf_rs_rmsnorm_fp8_cpu(q_, scale_, sums, out, input, symm, nullptr, weight_, &team_, tokens_, hidden,
                                      TPF_F32, kEps, 0, 16, 2, 1, TPF_KEEP_OUTPUT) == TPF_OK &&
               reduced(sums) &&
               tpf_rs_rmsnorm_fp8_cpu(q_, scale_, sums, out, input, symm, nullptr, weight_, &team_, tokens_, hidden,
                                      TPF_F32, kEps, 0, 16, 2, 1, TPF_GATHERED) == TPF_UNSUPPORTED;  // on CUDA alone
      case 2:
        return tpf_rs_rmsnorm_ag_cpu(out, sums, input, symm, nullptr, weight_, &team_, tokens_, hidden, TPF_F32, kEps,
                                     0, 0) == TPF_OK &&
               reduced(sums);
      case 3:
        return tpf_reduce_scatter_rows_cpu(sums, input, symm, nullptr, &team_, tokens_, hidden, TPF_F32, 0) == TPF_OK &&
               reduced(sums);
      case 4:
        return tpf_rs_rmsnorm_cpu(out, sums, input, symm, nullptr, weight_, &team_, tokens_, hidden, TPF_F32, kEps, 0,
                                  TPF_COMPLETE) == TPF_OK;
      case 5:
        for (int64_t i = 0; i < count_ * kHidden; ++i) sums[i] = value(round_, 0, start_ * kHidden + i);
        return tpf_all_gather_rows_cpu(out, sums, &team_, tokens_, hidden, TPF_F32) == TPF_OK && gathered(out);
      case 6:
        project();
        gather.op = TPF_QKV_A_PROJ_AG;
        return tpf_qkv_a_proj_ag_cpu(out, &team_, &gather) == TPF_OK && gathered(out);
      default:
        project();
        gather.op = TPF_QKV_A_PROJ_AG_NORM;
        return tpf_qkv_a_proj_ag_norm_cpu(out, sums, pe_.data(), weight_, weight_, &team_, &gather, kQ, kKv, kEps, 0) ==
                   TPF_OK &&
               gathered_last_columns();
    }
  }

  void project() {
    float* slot = static_cast<float*>(tpf_next_slot_cpu(&team_));
    for (int64_t i = 0; i < count_ * kHidden; ++i) slot[i] = value(round_, 0, start_ * kHidden + i);
  }

  bool reduced(const float* sums) const {
    for (int64_t i = 0; i < count_ * kHidden; ++i) {
      float sum = 0;
      for (int r = 0; r < kRanks; ++r) sum += value(round_, r, start_ * kHidden + i);
      if (sums[i] != sum) return false;
    }
    return true;
  }

  bool gathered(const float* rows) const {
    for (int64_t i = 0; i < tokens_ * kHidden; ++i) {
      if (rows[i] != value(round_, 0, i)) return false;
    }
    return true;
  }

  bool gathered_last_columns() const {
    const int64_t columns = kHidden - kQ - kKv;
    for (int64_t i = 0; i < tokens_ * columns; ++i) {
      if (pe_[i] != value(round_, 0, i / columns * kHidden + kQ + kKv + i % columns)) return false;
    }
    return true;
  }

  const int rank_;
  Memory& memory_;
  tpf_team team_;
  int round_ = 0;
  int64_t tokens_ = 0, start_ = 0, count_ = 0;
  std::vector<float> staged_ = std::vector<float>(kMaxTokens * kHidden), output_ = staged_, sums_ = staged_,
                     pe_ = staged_;
  float weight_[kHidden] = {}, scale_[kMaxTokens * 2];
  uint8_t q_[kMaxTokens * kHidden];
};

}  // namespace

int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  const auto bytes = static_cast<size_t>(tpf_region_bytes(kSlotBytes, 0));
  Memory memory;
  for (int r = 0; r < kRanks; ++r) {
    memory.region[r] = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::memset(memory.region[r], 0, bytes);
    memory.symmetric[r].resize((kMaxTokens + 2) * kHidden);
  }
  bool right[kRanks] = {};
  std::vector<std::thread> threads;
  for (int r = 0; r < kRanks; ++r) {
    threads.emplace_back([&, r] { right[r] = Rank(r, memory).run(rounds); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int r = 0; r < kRanks; ++r) std::free(memory.region[r]);
  for (const bool each : right) {
    if (!each) return 1;
  }
  std::printf("%d rounds of %d ranks\n", rounds, kRanks);
  return 0;
}
