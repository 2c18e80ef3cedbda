// The C API's CPU half on random calls, for AddressSanitizer and UndefinedBehaviorSanitizer to watch: ranks as threads,
// every buffer a heap block of exactly its size, every result compared with a simple loop. `make fuzz`.
//
// With TPF_LIBFUZZER libFuzzer supplies the bytes that choose the calls; else a generator does, whose seed is printed
// when something is found. Both take -max_total_time=SECONDS and -seed=NUMBER.
#include <sanitizer/common_interface_defs.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fuzz_call.h"
#include "fuzz_check.h"
#include "tp_fused.h"

namespace {

// ---- a rank's call ----

tpf_status run(const Call& call, const tpf_team& team) {
  const int rank = team.rank;
  const int64_t tokens = call.tokens(rank);
  const char* input = call.inputs[rank].data() + call.symm_offset;
  tpf_symm symm = {};
  for (int r = 0; r < team.world_size; ++r) symm.base[r] = call.inputs[r].data();
  symm.offset = call.symm_offset;
  symm.buffer = 1;
  const tpf_symm* in_place = call.in_place ? &symm : nullptr;
  const void *residual = call.residuals[rank].data(), *weight = call.weight->data();
  void *output = call.outputs[rank].data(), *sums = call.sums[rank].data();
  tpf_call said = {};
  said.op = call.op;
  said.dtype = call.dtype;
  said.num_tokens = tokens;
  said.hidden_size = 7168;
  said.columns = static_cast<uint32_t>(call.hidden_size);
  said.variant = call.variant & TPF_FLOAT_WEIGHT;
  said.source = -1;
  if (call.projects()) {
    std::memcpy(tpf_next_slot_cpu(&team), input, static_cast<size_t>(call.inputs[rank].bytes()));
  }
  switch (call.op) {
    case TPF_RS_RMSNORM:
      return tpf_rs_rmsnorm_cpu(output, sums, input, in_place, residual, weight, &team, tokens, call.hidden_size,
                                call.dtype, kEps, call.weight_offset, call.variant);
    case TPF_RS_RMSNORM_FP8:
      return tpf_rs_rmsnorm_fp8_cpu(
          call.q[rank].data(), reinterpret_cast<float*>(call.scales[rank].data()), sums, output, input, in_place,
          residual, weight, &team, tokens, call.hidden_size, call.dtype, kEps, call.weight_offset, call.group_size,
          call.column_scales() ? 1 : call.groups(),
          call.column_scales() ? pitch_of(rows_of(tokens, rank, team.world_size).count) : 1, call.variant);
    case TPF_RS_RMSNORM_AG:
      return tpf_rs_rmsnorm_ag_cpu(output, sums, input, in_place, residual, weight, &team, tokens, call.hidden_size,
                                   call.dtype, kEps, call.weight_offset, call.variant);
    case TPF_REDUCE_SCATTER_ROWS:
      return tpf_reduce_scatter_rows_cpu(sums, input, in_place, residual, &team, tokens, call.hidden_size, call.dtype,
                                         call.variant);
    case TPF_ALL_GATHER_ROWS:
      return tpf_all_gather_rows_cpu(output, input, &team, tokens, call.hidden_size, call.dtype);
    case TPF_QKV_A_PROJ_AG_NORM:
      return tpf_qkv_a_proj_ag_norm_cpu(output, sums, call.k_pe[rank].data(), weight, call.second_weight->data(), &team,
                                        &said, call.q_columns, call.kv_columns, kEps, call.weight_offset);
    default:
      return tpf_qkv_a_proj_ag_cpu(output, &team, &said);
  }
}

void fuzz_calls(Choices choices) {
  const int world_size = static_cast<int>(choices.between(1, 4));
  std::vector<Call> calls;
  int64_t slot_bytes = 4;
  for (int64_t count = choices.between(1, 4); count > 0; --count) {
    Call& call = calls.emplace_back(choose_call(choices, world_size));
    const int64_t most = rows_of(call.num_tokens + 1, 0, world_size).count * world_size;
    slot_bytes = std::max(slot_bytes, (most * call.row_bytes() + 3) / 4 * 4);
    make_memory(call, world_size, choices);
    if (call.odd_one >= 0) break;  // the workspace is of no use after it
  }
  const int64_t bytes = tpf_region_bytes(slot_bytes, 0);
  std::vector<Block> regions;
  std::vector<std::vector<tpf_status>> statuses(world_size, std::vector<tpf_status>(calls.size()));
  for (int rank = 0; rank < world_size; ++rank) {
    regions.emplace_back(bytes);
    std::memset(regions.back().data(), 0, static_cast<size_t>(tpf_region_bytes(0, 0)));
  }
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world_size; ++rank) {
    threads.emplace_back([&, rank] {
      tpf_team team = {};
      team.rank = rank;
      team.world_size = world_size;
      for (int r = 0; r < world_size; ++r) team.region[r] = regions[r].data();
      team.slot_bytes = slot_bytes;
      team.timeout_ns = 20'000'000'000;
      team.liveness_fd = team.device = -1;
      for (size_t i = 0; i < calls.size(); ++i) statuses[rank][i] = run(calls[i], team);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < calls.size(); ++i) {
    for (int rank = 0; rank < world_size; ++rank) {
      const tpf_status status = statuses[rank][i];
      const bool told = status == TPF_DISAGREE || status == TPF_PEER_FAULTED;
      // A peer that is a call ahead may have given up that one: who still waits in this call is told here.
      if (i + 1 < calls.size() && calls[i + 1].odd_one >= 0 && status == TPF_PEER_FAULTED) continue;
      if (calls[i].odd_one >= 0 ? !told : status != TPF_OK) wrong("op %d: status %d", calls[i].op, status);
      if (calls[i].odd_one >= 0) continue;
      const Checker checker = {calls[i], rank, world_size};
      calls[i].gathers() ? checker.gathered() : checker.reduced();
    }
  }
}

// ---- set-up ----

void fuzz_rows(Choices choices) {
  const auto num_tokens = static_cast<int64_t>(choices.bits(8)) >> choices.between(0, 63);
  const auto rank = static_cast<int32_t>(choices.yes() ? choices.between(0, 7) : choices.bits(4));
  const auto world_size = static_cast<int32_t>(choices.yes() ? choices.between(1, 8) : choices.bits(4));
  const Rows rows = rows_of(num_tokens, rank, world_size);
  if (num_tokens < 0 || rank < 0 || rank >= world_size) {
    if (rows.start != 0 || rows.count != 0) wrong("rows %lld of no rank", static_cast<long long>(rows.count));
    return;
  }
  __int128 start = 0;
  const int64_t per = num_tokens / world_size, rem = num_tokens % world_size;
  start = __int128{per} * rank + std::min<int64_t>(rank, rem);
  if (rows.start != start || rows.count != per + (rank < rem) || start + rows.count > num_tokens) {
    wrong("rank %d of %d owns %lld rows from %lld", rank, world_size, static_cast<long long>(rows.count),
          static_cast<long long>(rows.start));
  }
  const auto slot_bytes = static_cast<int64_t>(choices.bits(8));
  const int64_t bytes = tpf_region_bytes(slot_bytes, choices.yes());
  if (slot_bytes < 0 ? bytes != -1 : bytes != -1 && bytes / 2 < slot_bytes) wrong("a region of a few bytes");
}

// Whatever is asked, and of whatever card.
void fuzz_plan(Choices choices) {
  const auto some = [&](int64_t most, int bytes) {
    return choices.yes(4) ? static_cast<int64_t>(choices.bits(bytes)) : choices.between(0, most);
  };
  tpf_call call = {};
  call.op = static_cast<uint16_t>(some(12, 2));
  call.dtype = static_cast<uint16_t>(some(4, 2));
  call.num_tokens = some(20000, 8);
  call.hidden_size = static_cast<uint32_t>(some(20000, 4));
  call.columns = static_cast<uint32_t>(some(5000, 4));
  call.group_size = static_cast<uint32_t>(some(256, 4));
  call.variant = static_cast<uint32_t>(some(511, 4));
  call.q_columns = static_cast<uint32_t>(some(3000, 4));
  call.kv_columns = static_cast<uint32_t>(some(1000, 4));
  call.source = choices.yes() ? -1 : some(4096, 8);
  tpf_team team = {};
  team.world_size = static_cast<int32_t>(choices.between(1, TPF_MAX_RANKS));
  team.max_ctas = static_cast<int32_t>(some(200, 4));
  team.slot_bytes = some(1 << 30, 8);
  team.free_sms = static_cast<int32_t>(some(132, 4));
  team.free_cluster_sms = static_cast<int32_t>(some(120, 4));
  const char* const names[] = {"A100", "H20", "H100", "H200", "B200", "RTX PRO 6000"};
  tpf_card card = {};
  tpf_plan plan = {};
  if (tpf_card_named(&card, names[choices.between(0, 5)]) != TPF_OK) wrong("a card that is not known");
  if (tpf_plan_call(&plan, &call, &team, &card) != TPF_OK) return;
  if (plan.blocks < 1 || plan.threads < 32 || plan.threads > 1024 || plan.shared_bytes > card.shared_bytes) {
    wrong("op %d: a plan of %d blocks, %d threads and %lld bytes of shared memory", call.op, plan.blocks, plan.threads,
          static_cast<long long>(plan.shared_bytes));
  }
}

// A header that is not the creator's is refused, and a right one is not.
void fuzz_segment(Choices choices) {
  static int number = 0;
  const std::string name = "/tp_fused-fuzz-" + std::to_string(getpid()) + "-" + std::to_string(++number);
  const int64_t bytes = choices.yes(8) ? static_cast<int64_t>(choices.bits(8)) : choices.between(1, 10000);
  const uint64_t token = choices.bits(8);
  tpf_segment made = {}, opened = {};
  if (bytes > 1 << 20 || bytes <= 0) {  // 1 MiB
    if (bytes > int64_t{1} << 45 || bytes <= 0) {
      if (tpf_segment_create(&made, name.c_str(), bytes, token) == TPF_OK) wrong("created a segment of no such size");
      tpf_refusal refusal = {};
      if (tpf_segment_open(&opened, name.c_str(), bytes, token, &refusal) == TPF_OK) wrong("opened what is not there");
    }
    return;
  }
  if (tpf_segment_create(&made, name.c_str(), bytes, token) != TPF_OK) wrong("cannot create a segment");
  std::memset(made.base, 0x5a, static_cast<size_t>(bytes));
  char* header = static_cast<char*>(made.base) - TPF_SEGMENT_HEADER_BYTES;
  char before[64];
  std::memcpy(before, header, sizeof before);
  for (int64_t count = choices.between(0, 4); count > 0; --count) {
    header[choices.between(0, choices.yes() ? 31 : TPF_SEGMENT_HEADER_BYTES - 1)] = static_cast<char>(choices.bits(1));
  }
  bool right = std::memcmp(before, header, 32) == 0;
  if (choices.yes(4)) {
    const int64_t size = choices.between(0, 2 * bytes + TPF_SEGMENT_HEADER_BYTES);
    if (ftruncate(made.fd, size) != 0) wrong("ftruncate");
    right = right && size == bytes + TPF_SEGMENT_HEADER_BYTES;
  }
  const int64_t asked = choices.yes(4) ? choices.between(-5, 20000) : bytes;
  const uint64_t shown = choices.yes(4) ? choices.bits(8) : token;
  right = right && asked == bytes && shown == token;
  tpf_refusal refusal = {};
  const tpf_status status = tpf_segment_open(&opened, name.c_str(), asked, shown, &refusal);
  if (right != (status == TPF_OK))
    wrong("a segment that is %s opens with status %d", right ? "right" : "wrong", status);
  if (status == TPF_REFUSED && (refusal.check == nullptr || refusal.found == refusal.expected)) wrong("no reason");
  if (status == TPF_OK && static_cast<char*>(opened.base)[bytes - 1] != 0x5a) wrong("other memory");
  tpf_segment_close(&opened);
  tpf_segment_close(&opened);
  tpf_segment_close(&made);
  if (tpf_segment_unlink(name.c_str()) != TPF_OK) wrong("cannot unlink");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choices choices(data, size);
  const uint64_t kind = choices.bits(1);
  kind < 176   ? fuzz_calls(choices)
  : kind < 208 ? fuzz_segment(choices)
  : kind < 240 ? fuzz_plan(choices)
               : fuzz_rows(choices);
  return 0;
}

#if !defined(TPF_LIBFUZZER)
uint64_t seed = 0;

extern "C" const char* __asan_default_options() { return "handle_abort=1"; }  // the callback below hears of it

int main(int count, char** arguments) {
  double seconds = 60;
  seed = std::random_device()();
  for (int i = 1; i < count; ++i) {
    if (std::strncmp(arguments[i], "-max_total_time=", 16) == 0) seconds = std::atof(arguments[i] + 16);
    if (std::strncmp(arguments[i], "-seed=", 6) == 0) seed = std::strtoull(arguments[i] + 6, nullptr, 10);
  }
  const uint64_t first = seed;
  __sanitizer_set_death_callback([] {
    std::fprintf(stderr, "again: fuzz_c_api -seed=%llu -max_total_time=0\n", static_cast<unsigned long long>(seed));
  });
  const auto begin = std::chrono::steady_clock::now();
  do {
    std::mt19937_64 random(seed);
    std::vector<uint8_t> data(random() % 160);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(data.data(), data.size());
    ++seed;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds);
  std::printf("%llu cases from seed %llu on: nothing found\n", static_cast<unsigned long long>(seed - first),
              static_cast<unsigned long long>(first));
}
#endif
