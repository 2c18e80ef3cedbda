// Whether the orders of the protocol hold on this card: litmus tests that are made of the product's own functions. All
// blocks of a launch run at once. Some are the ranks, in pairs that pass rows to each other round after round, and the
// others keep the memory busy. A vector that is not what its writer wrote is counted.
//
//   ordering SECONDS LITMUS...     a line of JSON each; a litmus test ends early when it has found something
//
// tests/test_cuda_ordering.py compiles it once for every order that can be weakened (weakened.cuh).
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "litmus.cuh"
#include "litmus_rows.cuh"
#include "litmus_words.cuh"

namespace {

using namespace tpf;

constexpr int kGridRows = 4;              // of blocks: ranks, and those that make noise
constexpr int kSharedBytes = 116 * 1024;  // more than half of an SM's: each block has one, and its L1, to itself
constexpr int64_t kNoiseBytes = int64_t{32} << 20;
constexpr std::chrono::seconds kLaunchLimit{10};  // a wait for an mbarrier has no deadline of its own

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Until the ranks have ended. Half of the blocks add to one line, all to the same and to another one every few
// microseconds: what comes to that slice of the L2 cache has to queue. The others read and write all over.
__device__ void make_noise(const Setup& setup, uint32_t ranks) {
  constexpr uint32_t kRow = kThreads * 16;
  const shared_ref<uint32_t> done(setup.counters->done);
  for (uint32_t turn = blockIdx.y * gridDim.x + blockIdx.x; done.load(order::memory_order_relaxed) < ranks;
       turn += gridDim.x * gridDim.y) {
    if (blockIdx.x % 2 == 0) {
      const int64_t line = mix(1, static_cast<uint32_t>(now_ns() >> 13)) % (kNoiseBytes / 128);
      uint32_t* const word = reinterpret_cast<uint32_t*>(setup.noise + line * 128) + threadIdx.x % 32;
#pragma unroll 1
      for (int i = 0; i < 8; ++i) atomicAdd(word, 1u);
    } else {
      const auto row = [&](uint32_t seed) { return setup.noise + mix(seed, turn) % (kNoiseBytes / kRow) * kRow; };
      store16(row(2) + threadIdx.x * 16, load16(row(3) + threadIdx.x * 16));
    }
  }
}

template <typename Litmus>
__device__ void run(const Setup& setup, uint32_t grid_rows, Litmus&& litmus) {
  if (blockIdx.y >= grid_rows) return make_noise(setup, grid_rows * gridDim.x);
  uint32_t wrong = 0;
  const bool ended = litmus(setup, wrong);
  if (wrong > 0) atomicAdd(&setup.counters->wrong, wrong);
  if (!ended && threadIdx.x == 0) atomicAdd(&setup.counters->faults, 1u);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&setup.counters->done, 1u);
}

#define RUN(...) run(setup, __VA_ARGS__)
#else
#define RUN(...)
#endif

// -DTPF_LITMUS=posted_rows+own_rows compiles the bodies of these kernels alone, which takes less time.
#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)
#ifndef TPF_LITMUS
#define TPF_LITMUS
#endif
constexpr bool is_compiled(std::string_view name) {
  constexpr std::string_view only = TEXT(TPF_LITMUS);
  return only.empty() || only.find(name) != only.npos;
}

}  // namespace

// A kernel that is called so in the machine code, too. Its ranks are so many rows of the grid.
#define LITMUS(NAME, ...)                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) NAME(const __grid_constant__ Setup setup) { \
    if constexpr (is_compiled(#NAME)) {                                                                 \
      RUN(__VA_ARGS__);                                                                                 \
    }                                                                                                   \
  }
LITMUS(stored_and_cached, 2, pass_rows<By::kThread, By::kCached>)
LITMUS(stored_and_loaded, 2, pass_rows<By::kThread, By::kThread>)
LITMUS(stored_and_copied, 2, pass_rows<By::kThread, By::kBulk>)
LITMUS(moved_in_bulk, 2, pass_rows<By::kBulk, By::kBulk>)
LITMUS(own_rows, 2, load_own_rows)
LITMUS(reused_buffers, kGridRows, reuse_buffers)
LITMUS(rows_in_place, 2, read_in_place)
LITMUS(posted_rows, 2, post_rows)
LITMUS(finished_tiles, 3, finish_tiles)
LITMUS(fault_records, 2, report_faults)

namespace {

struct Litmus {
  const char* name;
  void (*kernel)(Setup);
};
constexpr Litmus kAll[] = {
    {"stored_and_cached", stored_and_cached},
    {"stored_and_loaded", stored_and_loaded},
    {"stored_and_copied", stored_and_copied},
    {"moved_in_bulk", moved_in_bulk},
    {"own_rows", own_rows},
    {"reused_buffers", reused_buffers},
    {"rows_in_place", rows_in_place},
    {"posted_rows", posted_rows},
    {"finished_tiles", finished_tiles},
    {"fault_records", fault_records},
};

__global__ void fill_sources(char* sources) {
  store16(sources + (blockIdx.x * kSourceVectors + threadIdx.x) * 16, value(blockIdx.x, threadIdx.x));
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(2);
}

// All that the kernels work on. What lies before the sources is cleared for each launch.
struct Memory {
  explicit Memory(int pairs) : setup() {
    const int64_t slot_bytes = int64_t{pairs} * kBlockBytes, region = region_bytes(slot_bytes, true);
    cleared = 2 * region + 4096;
    check(cudaMalloc(&base, cleared + kSources * kSourceBytes + kNoiseBytes));
    setup.counters = reinterpret_cast<Counters*>(base + 2 * region);
    setup.sources = base + cleared;
    setup.noise = setup.sources + kSources * kSourceBytes;
    check(cudaMemset(setup.noise, 0, kNoiseBytes));
    fill_sources<<<kSources, kSourceVectors>>>(setup.sources);
    check(cudaGetLastError());
    for (int rank = 0; rank < 2; ++rank) {
      ReduceArgs& args = setup.ranks[rank];
      args.call = reduce_call(TPF_REDUCE_SCATTER_ROWS, TPF_F32, 2 * pairs, kThreads * kLanes<float>, nullptr, 0);
      args.fingerprint = fingerprint_of(args.call);
      args.partition = partition_of(args.call.num_tokens, 2);
      args.input = setup.noise;
      args.team.rank = rank;
      args.team.world_size = 2;
      for (int r = 0; r < 2; ++r) args.team.region[r] = base + r * region;
      args.team.slot_bytes = slot_bytes;
      args.team.timeout_ns = kWaitNs;
      args.team.mailbox = reinterpret_cast<tpf_fault*>(base + 2 * region + 1024);
    }
    ProjectionArgs& args = setup.projection;
    args.team = setup.ranks[0].team;
    args.call = setup.ranks[0].call;
    args.partition = setup.ranks[0].partition;
    args.row_blocks = pairs;
    args.column_tiles = 1;
  }

  Setup setup;
  char* base;
  int64_t cleared;
};

// Launches until one has found something, or for so many seconds. False where a launch does not end.
bool watch(const Litmus& litmus, Memory& memory, int pairs, double seconds) {
  using Clock = std::chrono::steady_clock;
  check(cudaFuncSetAttribute(litmus.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  Counters found = {};
  bool ends = true;
  int64_t rounds = 0;
  do {
    check(cudaMemset(memory.base, 0, memory.cleared));
    void* arguments[] = {&memory.setup};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(litmus.kernel), dim3(pairs, kGridRows), dim3(kThreads),
                                      arguments, kSharedBytes, nullptr));
    const auto limit = Clock::now() + kLaunchLimit;
    cudaError_t state;
    while ((state = cudaStreamQuery(nullptr)) == cudaErrorNotReady && ends) ends = Clock::now() < limit;
    if (!ends) break;
    check(state);
    check(cudaMemcpy(&found, memory.setup.counters, sizeof found, cudaMemcpyDeviceToHost));
    rounds += kRounds;
  } while (found.wrong == 0 && found.faults == 0 && Clock::now() < end);
  std::printf("{\"litmus\": \"%s\", \"rounds\": %lld, \"wrong\": %u, \"faults\": %u, \"ends\": %s}\n", litmus.name,
              static_cast<long long>(rounds), found.wrong, found.faults, ends ? "true" : "false");
  std::fflush(stdout);
  return ends;
}

}  // namespace

int main(int count, char** words) {
  int num_sms;
  check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  const int pairs = std::min(num_sms / kGridRows, TPF_MAX_CTAS);
  Memory memory(pairs);
  for (int i = 2; i < count; ++i) {
    for (const Litmus& litmus : kAll) {
      if (std::strcmp(litmus.name, words[i]) != 0) continue;
      if (!watch(litmus, memory, pairs, std::atof(words[1]))) std::_Exit(3);  // its kernel still runs
    }
  }
  return 0;
}
