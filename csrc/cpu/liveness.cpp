#include "liveness.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <vector>

#include "../tp_fused.h"

namespace tpf {
namespace {

// A forked child shares its parent's open file descriptions, and with them the locks: they would outlive the parent.
// So the child closes its copies.
std::mutex locks_mutex;
std::vector<int> locks;

void close_all_in_child() {
  for (const int fd : locks) close(fd);
  locks.clear();
  locks_mutex.unlock();
}

void remember(int fd) {
  [[maybe_unused]] static const int registered =
      pthread_atfork([] { locks_mutex.lock(); }, [] { locks_mutex.unlock(); }, close_all_in_child);
  const std::lock_guard lock(locks_mutex);
  locks.push_back(fd);
}

struct flock byte_of(int rank) {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return lock;
}

}  // namespace

bool died(int segment_fd, int rank) {
  struct flock lock = byte_of(rank);
  return fcntl(segment_fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

void release_lock(int fd) {
  const std::lock_guard lock(locks_mutex);
  const auto found = std::find(locks.begin(), locks.end(), fd);
  if (found == locks.end()) return;
  locks.erase(found);
  close(fd);
}

}  // namespace tpf

// A lock of an open file description: the kernel drops it when the process ends, however it ends, and it is not
// mistaken, as a pid would be, for a zombie or for a later process. The description is of the lock's own: what is
// mapped keeps the segment's alive in a forked child, whatever the child closes.
tpf_status tpf_segment_hold(tpf_segment* segment, int32_t rank) {
  char path[32];
  std::snprintf(path, sizeof(path), "/proc/self/fd/%d", segment->fd);
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return TPF_SYSTEM;
  struct flock lock = tpf::byte_of(rank);
  if (fcntl(fd, F_OFD_SETLK, &lock) != 0) {
    close(fd);
    return TPF_SYSTEM;
  }
  tpf::remember(fd);
  segment->lock_fd = fd;
  return TPF_OK;
}
