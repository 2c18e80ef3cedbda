// Flag-in-data (protocol.h): vectors that are posted into a reader's inbox, and the look for them.
#pragma once
#include "peers.cuh"

namespace tpf {

// A vector in an inbox: inverted, and no word of it 0. The one word that would be, two NaN of 16 bits or one of 32,
// becomes its neighbour, which is NaN too. Words may come one by one.
__device__ inline void post16(void* address, uint4 raw) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(max(~raw.x, 1u)),
               "r"(max(~raw.y, 1u)), "r"(max(~raw.z, 1u)), "r"(max(~raw.w, 1u))
               : "memory");
}

__device__ inline bool has_arrived(uint4 posted) { return min(min(posted.x, posted.y), min(posted.z, posted.w)) != 0; }

__device__ inline uint4 posted_value(uint4 posted) { return {~posted.x, ~posted.y, ~posted.z, ~posted.w}; }

// By one thread: looks into the inbox until every vector that `comes(i)` has come; it lies `i * distance()` bytes
// behind `first`, and `vectors[i]` is 0 before. False, with the fault on record, where one does not come: `sender(i)`
// is named.
template <int kCount, typename First, typename Distance, typename Comes, typename Sender>
__device__ __forceinline__ bool take_posted(uint4 (&vectors)[kCount], const tpf_team& team, const tpf_call& call,
                                            const BlockRound& round, First&& place, Distance&& distance, Comes&& comes,
                                            Sender&& sender) {
  const auto missing = [&] {
    int peer = 0;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) {
      if (comes(i) && !has_arrived(vectors[i])) peer = sender(i);
    }
    return peer;
  };
  Backoff backoff;
  tpf_status status;
#pragma unroll 1
  do {
    // The vectors' addresses are worked out anew at each look: there are not the registers to keep them.
    int bytes = distance();
    const char* const first = place();
    asm volatile("" : "+r"(bytes));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (comes(i) && !has_arrived(vectors[i])) vectors[i] = load16_relaxed(first + i * bytes);
    }
    bool all = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) all &= !comes(i) || has_arrived(vectors[i]);
    if (all) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (comes(i)) vectors[i] = posted_value(vectors[i]);
      }
      return true;
    }
    status = backoff.ask(team, missing);
  } while (status == TPF_OK);
  const int peer = missing();
  report(team, call, round, status, peer, 0, observe(signal(team.region[team.rank], 0, blockIdx.x, peer)),
         backoff.waited_ns());
#pragma unroll
  for (int i = 0; i < kCount; ++i) vectors[i] = {};
  return false;
}

}  // namespace tpf
