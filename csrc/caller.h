// Who may call the ops of a workspace: one thread of the process that made it. The order in which two threads call
// differs from rank to rank, so ranks would add up rows of different calls.
#pragma once
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

namespace tpf {

class Caller {
 public:
  // Whether the calling thread may call. The first one that does becomes the caller, until it ends. A thread that has
  // been joined may still be on its way out: `patience_ms` for that.
  bool admit(int patience_ms = 100) {
    if (generation() != made_in_) return false;
    const Thread& self = this_thread();
    if (caller_.load(std::memory_order_relaxed) == self.number) return true;
    const std::lock_guard lock(mutex_);
    for (int look = 0; !alive_.expired(); ++look) {
      if (look == patience_ms) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    take(self);
    return true;
  }

  // The calling thread becomes the caller, whoever was.
  void attach() {
    const std::lock_guard lock(mutex_);
    take(this_thread());
  }

  // The system's number of the thread that is the caller; 0: none is yet.
  int thread_id() const { return thread_id_.load(std::memory_order_relaxed); }

 private:
  struct Thread {
    uint64_t number;                   // never used again, unlike the system's
    std::shared_ptr<const int> alive;  // gone when the thread has ended
    int id;
  };

  static const Thread& this_thread() {
    static std::atomic<uint64_t> threads{0};
    thread_local const Thread self = {++threads, std::make_shared<const int>(0), gettid()};
    return self;
  }

  // How many forks this process is away from the one that loaded the library.
  static uint32_t generation();

  void take(const Thread& self) {
    alive_ = self.alive;
    thread_id_.store(self.id, std::memory_order_relaxed);
    caller_.store(self.number, std::memory_order_relaxed);
  }

  const uint32_t made_in_ = generation();
  std::atomic<uint64_t> caller_{0};
  std::atomic<int> thread_id_{0};
  std::weak_ptr<const int> alive_;
  std::mutex mutex_;
};

}  // namespace tpf
