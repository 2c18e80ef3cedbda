#include "caller.h"

#include <pthread.h>

namespace tpf {
namespace {
uint32_t forks = 0;  // written by the only thread that a child has at first
}

uint32_t Caller::generation() {
  [[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { ++forks; });
  return forks;
}

}  // namespace tpf
