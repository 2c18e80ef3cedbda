// One rank's team, with the symmetric buffers that its inputs may lie in.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "caller.h"
#include "protocol.h"
#include "tp_fused.h"

namespace tpf {

using Address = uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

class Team {
 public:
  Team(int rank, const std::vector<Address>& regions, int64_t slot_bytes, int64_t timeout_ns, int max_ctas,
       int liveness_fd, int device, Address mailbox, int free_sms, int free_cluster_sms) {
    team_ = {};
    team_.rank = rank;
    team_.world_size = static_cast<int32_t>(regions.size());
    for (size_t r = 0; r < regions.size(); ++r) team_.region[r] = at(regions[r]);
    team_.slot_bytes = slot_bytes;
    team_.timeout_ns = timeout_ns;
    team_.max_ctas = max_ctas;
    team_.liveness_fd = liveness_fd;
    team_.device = device;
    team_.mailbox = at<tpf_fault>(mailbox);
    team_.free_sms = free_sms;
    team_.free_cluster_sms = free_cluster_sms;
  }

  const tpf_team* get() const { return &team_; }
  // Called by a wait now and then; where it does not return 0 the wait ends.
  void set_interrupted(int32_t (*interrupted)()) { team_.interrupted = interrupted; }
  bool on_cuda() const { return team_.device >= 0; }
  // What an earlier call has run into; nothing is launched, or written into the next slot, on a workspace that has
  // faulted: a peer that is late may still read there.
  int fault_status() const {
    if (on_cuda()) return static_cast<const volatile tpf_fault*>(team_.mailbox)->status;
    Control* own = control(team_.region[team_.rank]);
    const bool faulted = shared_ref<uint32_t>(own->faulted).load(order::memory_order_acquire) != 0;
    return faulted ? own->fault.status : TPF_OK;
  }

  // Before a launch on `stream`, a CUDA stream.
  tpf_status follow_stream(void* stream) const { return tpf_follow_stream_cuda(&stream_order_, &team_, stream); }
  // Whether a CUDA graph has a call of this team.
  bool captured() const { return stream_order_.captured != 0; }

  // Memory that addresses of the team point into: it stays mapped for an op that another thread is in while the
  // workspace is closed.
  void keep(std::shared_ptr<void> memory) {
    const std::lock_guard lock(mutex_);
    kept_.push_back(std::move(memory));
  }

  // Makes known that [bases[r], bases[r] + bytes) are one symmetric buffer: inputs inside it are read in place. All
  // ranks add theirs in the same order, which numbers them.
  void add_symmetric_buffer(const std::vector<Address>& bases, int64_t bytes) {
    Buffer buffer = {{}, bytes};
    for (size_t r = 0; r < bases.size(); ++r) buffer.symm.base[r] = at(bases[r]);
    const std::lock_guard lock(mutex_);
    buffer.symm.buffer = static_cast<uint32_t>(buffers_.size() + 1);
    buffers_.push_back(buffer);
  }

  // Where `input` lies in symmetric memory; false where it does not.
  bool find(const void* input, tpf_symm* symm) const {
    const std::lock_guard lock(mutex_);
    for (const Buffer& buffer : buffers_) {
      const int64_t offset = static_cast<const char*>(input) - static_cast<const char*>(buffer.symm.base[team_.rank]);
      if (offset < 0 || offset >= buffer.bytes) continue;
      *symm = buffer.symm;
      symm->offset = offset;
      return true;
    }
    return false;
  }

 private:
  struct Buffer {
    tpf_symm symm;
    int64_t bytes;
  };
  tpf_team team_;
  mutable tpf_stream_order stream_order_ = {};  // one thread calls: see Caller
  std::vector<Buffer> buffers_;
  std::vector<std::shared_ptr<void>> kept_;
  mutable std::mutex mutex_;  // of both: ops run without the interpreter's lock
};

// Where an op's input lies in symmetric memory; null where it does not.
struct Input {
  Input(const Team& team, const void* input) : symm_(), found_(team.find(input, &symm_)) {}
  const tpf_symm* get() const { return found_ ? &symm_ : nullptr; }

 private:
  tpf_symm symm_;
  bool found_;
};

// Raises for Python what is neither a fault nor in order.
inline tpf_status checked(tpf_status status) {
  if (status == TPF_CUDA_ERROR) throw std::runtime_error(std::string("CUDA: ") + tpf_cuda_error_string());
  if (status == TPF_UNSUPPORTED) throw std::runtime_error("this build of tp_fused cannot run that");
  return status;
}

// What the kernels of torch's dispatcher know of a workspace (tp_fused/workspace.py).
struct Workspace {
  std::shared_ptr<const Team> team;
  std::shared_ptr<Caller> caller;
  int64_t max_num_tokens, row_bytes;
};

}  // namespace tpf
