// How the ranks of a workspace meet. Compiled for the CPU backend and for CUDA, so that the tests with threads and
// processes on a CPU exercise the very state machine that runs on the GPU.
//
// Every rank owns one region of symmetric memory, laid out alike:
//
//     [ Control | signals: steps x ctas x ranks | staging slot 0 | staging slot 1 | CUDA: inbox 0 | inbox 1 ]
//
// A *round* is one exchange of data. Rounds are counted by an epoch that every rank keeps in its own Control; an op is
// one round, or two (rs_rmsnorm_ag; on CUDA of few tokens one). rs_rmsnorm_ag_fp8 is two ops or three; on CUDA of few
// tokens one. In a round each rank
//
//   1. announces its call in its own Control, writes its rows to its own slot (epoch & 1) or to its peers',
//   2. publishes: stores `epoch (32) | fingerprint (32)` with release order into its word in every peer's signals,
//   3. observes: loads its own words with acquire order until every peer's epoch is mine, or a little later: a fast
//      peer may be a round ahead,
//   4. reads what the peers wrote, and 5. sets its epoch.
//
// What is ordered. The rows and the announced call are written before the release and read after the acquire. A slot is
// written again two rounds later, and its reader has published the round in between: so two slots, used in turn, make
// one synchronisation a round enough. An input that peers read in place (zero-copy) is the caller's memory and not a
// slot; such a round has a closing step, published after the last read, and the op ends when all peers have
// published it. CUDA: what such an input holds was written by kernels that have ended, and the round's own kernel only
// reads it: so the words that open and close the round need no fence.
//
// What is flag-in-data. CUDA: rows of small calls are posted into the reader's inbox (epoch & 1). A word of an inbox is
// 0 until it is written; what is written is the inverted word of the row, and never 0. So the reader looks at the row
// itself, and neither waits for a fence. It sets back to 0 what it has read, in the same round; the
// inbox is written again two rounds later, when its reader has published the round in between. The call is still
// published and observed, before the rows count. In rs_rmsnorm_ag an owner may post its normalised row as well, in the
// same round: behind what the sources post, so that each word of an inbox is written once a round.
//
// What is agreed. The fingerprint is a hash of the call. A word of my epoch with another fingerprint is a disagreement;
// the two announced calls then say in what. A word of a later epoch was written by a peer that has finished my round,
// and it could finish only because it found my fingerprint equal to its own.
//
// What is bounded. Every wait has a deadline. A rank that gives up writes a record into its Control and sets `faulted`;
// whoever waits for it looks there (and at `closed`) from time to time, so that one rank's fault ends the others'
// waits. It also writes `notified` in every peer's Control: a rank that comes after the others have given up finds all
// their words, and would complete alone what they did not.
//
// What stays with the caller: calls of one workspace are issued in one order, the same on all ranks. CUDA: they follow
// each other on the device, too. Every block knows how many blocks the calls before it had, and `ended` counts those
// that have ended: a block that begins before all of them have gives up (TPF_OVERLAP).
#pragma once
#include <cstdint>
#include <cstring>

#include "partition.h"
#include "tp_fused.h"

// TPF_DEVICE: of what ranks do to meet, which under nvcc runs on the GPU alone.
#if defined(__CUDACC__)
#include "cuda/ptx/atomic.cuh"
#define TPF_DEVICE __device__
#else
#include <atomic>
#define TPF_DEVICE
#endif

namespace tpf {

#if defined(__CUDACC__)
template <typename T>
using shared_ref = AtomicRef<T, kSystemScope>;
#else
template <typename T>
using shared_ref = std::atomic_ref<T>;
namespace order = std;
#endif

// How far a rank has come; all counts are modulo 2^32. On CUDA every block reads the entry of its own number, and the
// blocks of a grid together advance all entries: no block waits for another to know the epoch, whatever grids follow
// each other. On the CPU there is entry 0.
struct alignas(8) Progress {
  uint32_t epoch;   // rounds this rank has finished
  uint32_t blocks;  // CUDA: of all ops this rank has begun
  uint32_t calls;   // ops this rank has begun
  uint32_t begun;   // CUDA: the same, unless two ops began at the same time
};

struct Control {
  // What an op looks at when it begins: 16 bytes, read at once.
  uint32_t faulted;   // set once `fault` is valid
  uint32_t notified;  // 1 + the rank that has given up and says so; 0: none has
  uint32_t closed;
  uint32_t ended;  // CUDA: blocks that have ended

  uint32_t claimed;       // CUDA: the first thread to meet a fault writes the record
  uint32_t fetched;       // CUDA: tiles whose operands a projection has asked for. The last one sets it back to 0.
  tpf_call announced[2];  // what the owner calls in round e, at e & 1
  uint32_t claims[2];     // CUDA: rows that blocks have taken one by one in call c, at c & 1
  // CUDA: column tiles of a row block that a projection has finished. Whoever finishes the last one sets it back to 0.
  uint32_t finished[TPF_MAX_ROW_BLOCKS];
  tpf_fault fault;
  Progress progress[TPF_MAX_CTAS];  // only its owner touches it
};

// The record of a rank that has none, where there ought to be one: peers have told it that they gave up, or two of its
// calls began at the same time. TPF_OK: neither.
inline tpf_fault unrecorded_fault(const Control& own, int rank) {
  tpf_fault fault = {};
  const Progress& now = own.progress[0];
  if (own.notified == 0 && (now.begun == 0 || now.begun == now.calls)) return fault;
  fault.status = own.notified != 0 ? TPF_PEER_FAULTED : TPF_OVERLAP;
  fault.rank = rank;
  fault.peer = own.notified != 0 ? static_cast<int32_t>(own.notified) - 1 : rank;
  fault.epoch = now.epoch;
  fault.call_number = now.calls;
  fault.expected = own.announced[fault.epoch & 1];
  return fault;
}

constexpr int64_t kControlBytes = 8192;
constexpr int64_t kSignalBytes = int64_t{TPF_MAX_STEPS} * TPF_MAX_CTAS * TPF_MAX_RANKS * sizeof(uint64_t);
static_assert(sizeof(Control) <= kControlBytes);

// An inbox takes the rows of all ranks and the residual's, as long as that is little: larger calls do not wait for
// fences most. At most it takes 512 tokens of DeepSeek-V3 of two ranks.
constexpr int64_t kMaxInboxBytes = int64_t{24} << 20;

TPF_HD constexpr int64_t inbox_bytes(int64_t slot_bytes) {
  constexpr int64_t kMost = 1 + TPF_MAX_RANKS;
  return slot_bytes < kMaxInboxBytes / kMost ? kMost * slot_bytes : kMaxInboxBytes;
}

TPF_HD constexpr int64_t region_bytes(int64_t slot_bytes, bool on_cuda) {
  return kControlBytes + kSignalBytes + 2 * slot_bytes + (on_cuda ? 2 * inbox_bytes(slot_bytes) : 0);
}

TPF_HD inline Control* control(void* region) { return static_cast<Control*>(region); }

// The word that rank `from` writes into `region` for block `cta` at `step` of a round.
TPF_HD inline uint64_t* signal(void* region, int step, int cta, int from) {
  return reinterpret_cast<uint64_t*>(static_cast<char*>(region) + kControlBytes) +
         (int64_t{step} * TPF_MAX_CTAS + cta) * TPF_MAX_RANKS + from;
}

TPF_HD inline char* slot(void* region, uint32_t epoch, int64_t slot_bytes) {
  return static_cast<char*>(region) + kControlBytes + kSignalBytes + (epoch & 1) * slot_bytes;
}

TPF_HD inline char* inbox(void* region, uint32_t epoch, int64_t slot_bytes) {
  return static_cast<char*>(region) + kControlBytes + kSignalBytes + 2 * slot_bytes +
         (epoch & 1) * inbox_bytes(slot_bytes);
}

// What the ops that reduce announce.
inline tpf_call reduce_call(tpf_op op, tpf_dtype dtype, int64_t num_tokens, int32_t hidden_size, const tpf_symm* symm,
                            uint32_t variant) {
  tpf_call call = {};
  call.op = op;
  call.dtype = dtype;
  call.num_tokens = num_tokens;
  call.hidden_size = static_cast<uint32_t>(hidden_size);
  call.variant = variant;
  call.buffer = symm == nullptr ? 0 : symm->buffer;
  call.source = symm == nullptr ? -1 : symm->offset;
  return call;
}

// What the projections announce; q_columns and kv_columns are qkv_a_proj_ag_norm's.
inline tpf_call projection_call(tpf_op op, tpf_dtype dtype, int64_t num_tokens, int64_t hidden_size, int64_t columns,
                                bool bias = false, int64_t q_columns = 0, int64_t kv_columns = 0) {
  tpf_call call = {};
  call.op = op;
  call.dtype = dtype;
  call.num_tokens = num_tokens;
  call.hidden_size = static_cast<uint32_t>(hidden_size);
  call.columns = static_cast<uint32_t>(columns);
  call.q_columns = static_cast<uint32_t>(q_columns);
  call.kv_columns = static_cast<uint32_t>(kv_columns);
  call.variant = bias ? TPF_BIAS : 0;
  call.source = -1;
  return call;
}

// The same call with what all ranks' norms must have in common.
inline tpf_call with_norm(tpf_call call, float eps, float weight_offset) {
  call.eps = eps;
  call.weight_offset = weight_offset == 0 ? 0 : weight_offset;  // -0 is the same offset
  return call;
}

// What all_gather_rows announces; group_size: of scales that are gathered with the rows.
inline tpf_call gather_call(tpf_dtype dtype, int64_t num_tokens, int32_t hidden_size, int32_t group_size = 0) {
  tpf_call call = {};
  call.op = TPF_ALL_GATHER_ROWS;
  call.dtype = dtype;
  call.num_tokens = num_tokens;
  call.hidden_size = static_cast<uint32_t>(hidden_size);
  call.group_size = static_cast<uint32_t>(group_size);
  call.source = -1;
  return call;
}

inline int64_t bytes_of(tpf_dtype dtype) {
  return dtype == TPF_F32 ? 4 : dtype == TPF_BF16 || dtype == TPF_F16 ? 2 : 1;
}

// An fp8 scale as a power of two, rounded up (UE8M0), by the bits of both; what is not finite stays as it is. Its
// reciprocal is exact. The least is 2^-126, of a group of zeros, too.
constexpr uint32_t kLeastScaleBits = 0x00800000, kInfinityBits = 0x7f800000;
TPF_HD constexpr uint32_t rounded_scale_bits(uint32_t bits) {
  if (bits >= kInfinityBits) return bits;
  const uint32_t up = (bits + 0x007fffff) & kInfinityBits;
  return up > kLeastScaleBits ? up : kLeastScaleBits;
}
TPF_HD constexpr uint32_t reciprocal_bits(uint32_t power_of_two) { return 0x7f000000 - power_of_two; }

// What is added to a norm's weight: of an offset of 0, what leaves every weight as it is, -0 too.
TPF_HD inline float weight_addend(float offset) { return offset == 0 ? -0.0f : offset; }

// Of what a projection makes: the call announces the dtype of what goes in.
inline tpf_dtype latent_dtype(const tpf_call& call) {
  return call.dtype == TPF_E4M3 ? TPF_BF16 : static_cast<tpf_dtype>(call.dtype);
}

// Whether a projection norms parts of its rows.
inline bool is_normed(const tpf_call& call) {
  return call.op == TPF_QKV_A_PROJ_AG_NORM || call.op == TPF_QKV_A_PROJ_AG_NORM_FP8;
}

constexpr int kQuantizedColumns = 128;  // of q_a, that share a scale

// The columns that `rank` multiplies where all ranks have all rows (TPF_COMPLETE): vectors of 16 bytes, or the columns
// that share a scale.
TPF_HD inline Rows latent_columns_of(const tpf_call& call, int rank, int world_size) {
  return columns_of(call.columns, call.dtype == TPF_E4M3 ? 128 : 8, rank, world_size);
}

TPF_HD inline uint32_t mix(uint32_t hash, uint32_t value) {
  hash ^= value;  // the finaliser of MurmurHash3: every bit of the value reaches every bit of the hash
  hash = (hash ^ (hash >> 16)) * 0x85ebca6bu;
  hash = (hash ^ (hash >> 13)) * 0xc2b2ae35u;
  return hash ^ (hash >> 16);
}

TPF_HD inline uint32_t mix_float(uint32_t hash, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return mix(hash, bits);
}

TPF_HD inline uint32_t fingerprint_of(const tpf_call& call) {
  uint32_t hash = mix(0x9e3779b9u, call.op);
  hash = mix(hash, call.dtype);
  hash = mix(hash, static_cast<uint32_t>(call.num_tokens));
  hash = mix(hash, static_cast<uint32_t>(call.num_tokens >> 32));
  hash = mix(hash, call.hidden_size);
  hash = mix(hash, call.columns);
  hash = mix(hash, call.group_size);
  hash = mix(hash, call.variant);
  hash = mix(hash, call.q_columns);
  hash = mix(hash, call.kv_columns);
  hash = mix_float(hash, call.eps);
  hash = mix_float(hash, call.weight_offset);
  hash = mix(hash, call.buffer);
  hash = mix(hash, static_cast<uint32_t>(call.source));
  return mix(hash, static_cast<uint32_t>(call.source >> 32));
}

TPF_HD constexpr uint64_t signal_word(uint32_t epoch, uint32_t fingerprint) {
  return uint64_t{epoch} << 32 | fingerprint;
}
TPF_HD constexpr uint32_t epoch_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
// Epochs begin again after 2^32 rounds. A peer is a round or two ahead at most. A word that few calls use, of a block
// or a step that most do without, must not seem ahead when they have gone round: so whoever reads it looks after its
// age every kOldest rounds.
constexpr uint32_t kMostAhead = 16, kOldest = 1u << 28;
TPF_HD constexpr bool reached(uint32_t seen, uint32_t mine) { return seen - mine <= kMostAhead; }

// Whether a call of so many rounds, after round `epoch`, comes by such a mark.
TPF_HD constexpr bool refreshes(uint32_t epoch, int rounds) { return epoch / kOldest != (epoch + rounds) / kOldest; }

// Makes an old word of this rank's region a younger one that says as little. A peer's store into it is not lost.
TPF_DEVICE inline void refresh(uint64_t* word, uint32_t epoch) {
  shared_ref<uint64_t> shared(*word);
  uint64_t seen = shared.load(order::memory_order_relaxed);
  if (epoch - epoch_of(seen) < kOldest / 2 || reached(epoch_of(seen), epoch)) return;
  shared.compare_exchange_strong(seen, signal_word(epoch - 1, 0), order::memory_order_relaxed);
}

TPF_DEVICE inline void publish(uint64_t* word, uint32_t epoch, uint32_t fingerprint) {
  shared_ref<uint64_t>(*word).store(signal_word(epoch, fingerprint), order::memory_order_release);
}

TPF_DEVICE inline uint64_t observe(uint64_t* word) {
  return shared_ref<uint64_t>(*word).load(order::memory_order_acquire);
}

// Waits for a peer's word. `backoff()` is called between two looks; it may sleep, and ends the wait by returning
// anything but TPF_OK. `seen` is the last word read.
template <typename Backoff>
TPF_DEVICE inline tpf_status wait_for(uint64_t* word, uint32_t epoch, uint32_t fingerprint, uint64_t* seen,
                                      Backoff&& backoff) {
  for (;;) {
    *seen = observe(word);
    if (reached(epoch_of(*seen), epoch)) {
      return epoch_of(*seen) == epoch && *seen != signal_word(epoch, fingerprint) ? TPF_DISAGREE : TPF_OK;
    }
    if (const tpf_status status = backoff(); status != TPF_OK) return status;
  }
}

}  // namespace tpf
