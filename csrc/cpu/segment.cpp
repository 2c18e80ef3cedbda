// POSIX shared-memory segments. Rank 0 creates one under a random name, the others open it, and the name goes at once.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "../protocol.h"
#include "liveness.h"

namespace {

tpf_status map(tpf_segment* segment, int fd, int64_t bytes) {
  void* base = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) {
    close(fd);
    return errno == ENOMEM ? TPF_NO_SPACE : TPF_SYSTEM;
  }
  *segment = {base, bytes, fd, -1};
  return TPF_OK;
}

}  // namespace

// The row kernels are compiled for x86-64-v3 (Haswell, 2013) where the compiler targets x86; this file is not.
int32_t tpf_cpu_supported(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return 1;
#endif
}

void tpf_rows_of(int64_t* start, int64_t* count, int64_t num_tokens, int32_t rank, int32_t world_size) {
  const tpf::Rows rows = tpf::rows_of(num_tokens, rank, world_size);
  *start = rows.start;
  *count = rows.count;
}

int64_t tpf_region_bytes(int64_t slot_bytes, int32_t on_cuda) { return tpf::region_bytes(slot_bytes, on_cuda != 0); }

tpf_status tpf_segment_create(tpf_segment* segment, const char* name, int64_t bytes) {
  const int fd = shm_open(name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) return TPF_SYSTEM;
  // Pages are taken now: without this a full /dev/shm is a SIGBUS in the middle of a call.
  if (const int error = posix_fallocate(fd, 0, bytes); error != 0) {
    shm_unlink(name);
    close(fd);
    errno = error;
    return error == ENOSPC || error == ENOMEM || error == EFBIG ? TPF_NO_SPACE : TPF_SYSTEM;
  }
  const tpf_status status = map(segment, fd, bytes);
  if (status != TPF_OK) shm_unlink(name);
  return status;
}

tpf_status tpf_segment_open(tpf_segment* segment, const char* name, int64_t bytes) {
  const int fd = shm_open(name, O_RDWR | O_CLOEXEC, 0600);
  return fd < 0 ? TPF_SYSTEM : map(segment, fd, bytes);
}

tpf_status tpf_segment_unlink(const char* name) { return shm_unlink(name) == 0 ? TPF_OK : TPF_SYSTEM; }

void tpf_segment_close(tpf_segment* segment) {
  if (segment->base == nullptr) return;
  munmap(segment->base, static_cast<size_t>(segment->bytes));
  tpf::release_lock(segment->lock_fd);
  close(segment->fd);
  *segment = {nullptr, 0, -1, -1};
}
