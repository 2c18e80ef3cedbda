#include "round.h"

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <chrono>

#include "liveness.h"

namespace tpf {
namespace {

using Clock = std::chrono::steady_clock;

uint32_t word(uint32_t& shared) { return shared_ref<uint32_t>(shared).load(std::memory_order_acquire); }
bool flag(uint32_t& shared) { return word(shared) != 0; }

// What a rank does between two looks at a peer's word. Ranks may outnumber cores: after a short spin the core is given
// away, first by sched_yield and then, when the peer is clearly busy elsewhere, by sleeping.
class Backoff {
 public:
  Backoff(const tpf_team& team, int peer) : team_(team), peer_(peer) {}

  tpf_status operator()() {
    if (++looks_ < 64) return TPF_OK;
    // A peer that is gone may have published just before: its word is looked at once more.
    if (verdict_ != TPF_OK) return verdict_;
    const int64_t waited = waited_ns();
    if (waited < 200'000) {
      sched_yield();
      return TPF_OK;
    }
    if (waited > team_.timeout_ns) return verdict_ = TPF_NEVER_ARRIVED, TPF_OK;
    if (waited > next_check_ns_) {
      next_check_ns_ = waited + 2'000'000;
      if (flag(control(team_.region[team_.rank])->notified)) return verdict_ = TPF_PEER_FAULTED, TPF_OK;
      if (flag(control(team_.region[peer_])->closed)) return verdict_ = TPF_PEER_CLOSED, TPF_OK;
      if (team_.liveness_fd >= 0 && died(team_.liveness_fd, peer_)) return verdict_ = TPF_PEER_DIED, TPF_OK;
    }
    if (waited > next_interrupt_ns_) {
      next_interrupt_ns_ = waited + 100'000'000;
      if (team_.interrupted != nullptr && team_.interrupted() != 0) return TPF_INTERRUPTED;
    }
    const timespec nap = {0, static_cast<long>(std::min<int64_t>(waited / 8, 1'000'000))};
    nanosleep(&nap, nullptr);
    return TPF_OK;
  }

  int64_t waited_ns() const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start_).count();
  }

 private:
  const tpf_team& team_;
  const int peer_;
  const Clock::time_point start_ = Clock::now();
  int looks_ = 0;
  int64_t next_check_ns_ = 1'000'000, next_interrupt_ns_ = 100'000'000;
  tpf_status verdict_ = TPF_OK;
};

}  // namespace

Round::Round(const tpf_team& team, const tpf_call& call)
    : team_(team), call_(call), fingerprint_(fingerprint_of(call)), own_(control(team.region[team.rank])) {}

void Round::announce() {
  epoch_ = own_->progress[0].epoch + 1;
  own_->announced[epoch_ & 1] = call_;
  if (!refreshes(epoch_ - 1, 1)) return;
  for (int word = 0; word < TPF_MAX_STEPS * TPF_MAX_RANKS; ++word) {
    refresh(signal(own_, word / TPF_MAX_RANKS, 0, word % TPF_MAX_RANKS), epoch_);
  }
}

tpf_status Round::begin() {
  if (own_->faulted) return static_cast<tpf_status>(own_->fault.status);
  ++own_->progress[0].calls;
  announce();
  // A rank that comes after its peers have given up would find all their words and go on alone.
  return flag(own_->notified) ? fail(TPF_PEER_FAULTED, rank(), 0, 0, 0) : TPF_OK;
}

tpf_status Round::begin_next() {
  announce();
  return TPF_OK;
}

tpf_status Round::meet(int step) {
  for (int peer = 0; peer < world_size(); ++peer) {
    if (peer != rank()) publish(signal(team_.region[peer], step, 0, rank()), epoch_, fingerprint_);
  }
  for (int peer = 0; peer < world_size(); ++peer) {
    if (peer == rank()) continue;
    uint64_t seen = 0;
    Backoff backoff(team_, peer);
    const tpf_status status =
        wait_for(signal(team_.region[rank()], step, 0, peer), epoch_, fingerprint_, &seen, backoff);
    if (status != TPF_OK) return fail(status, peer, step, seen, backoff.waited_ns());
  }
  return TPF_OK;
}

tpf_status Round::end(bool zero_copy) {
  if (zero_copy) {
    if (const tpf_status status = meet(1); status != TPF_OK) return status;
    // A peer that gave up after its word of this step may have changed its input before it was read here.
    if (flag(own_->notified)) return fail(TPF_PEER_FAULTED, rank(), 1, 0, 0);
  }
  own_->progress[0].epoch = epoch_;
  return TPF_OK;
}

tpf_status Round::fail(tpf_status status, int peer, int step, uint64_t seen, int64_t waited_ns) {
  if (status == TPF_PEER_FAULTED) peer = static_cast<int>(word(own_->notified)) - 1;  // and not who is waited for
  tpf_fault& fault = own_->fault;
  fault = {};
  fault.status = status;
  fault.rank = rank();
  fault.peer = peer;
  fault.step = static_cast<uint32_t>(step);
  fault.epoch = epoch_;
  fault.seen_epoch = epoch_of(seen);
  fault.call_number = own_->progress[0].calls;
  fault.waited_ns = waited_ns;
  fault.expected = call_;
  if (status == TPF_DISAGREE) fault.seen = control(team_.region[peer])->announced[epoch_ & 1];
  shared_ref<uint32_t>(own_->faulted).store(1, std::memory_order_release);
  for (int other = 0; other < world_size(); ++other) {
    if (other == rank()) continue;
    shared_ref<uint32_t>(control(team_.region[other])->notified).store(1 + rank(), std::memory_order_release);
  }
  return status;
}

}  // namespace tpf

void tpf_team_close_cpu(const tpf_team* team) {
  tpf::shared_ref<uint32_t>(tpf::control(team->region[team->rank])->closed).store(1, std::memory_order_release);
}

tpf_fault tpf_team_fault_cpu(const tpf_team* team, int32_t rank) {
  tpf::Control* control = tpf::control(team->region[rank]);
  if (tpf::flag(control->faulted)) return control->fault;
  return rank == team->rank && tpf::flag(control->notified) ? tpf::unrecorded_fault(*control, rank) : tpf_fault{};
}

void* tpf_next_slot_cpu(const tpf_team* team) {
  void* region = team->region[team->rank];
  return tpf::slot(region, tpf::control(region)->progress[0].epoch + 1, team->slot_bytes);
}
