// POSIX shared-memory segments. Rank 0 creates one under a random name, the others open it, and the name goes at once.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "../protocol.h"
#include "liveness.h"

namespace {

// "tp_fused", as the bytes lie in memory.
constexpr uint64_t kMagic = 0x64657375665f7074;
// A build that lays regions out otherwise is told apart even where nobody has raised the version.
constexpr uint64_t kLayout =
    uint64_t{TPF_SEGMENT_VERSION} << 48 | uint64_t{tpf::kSignalBytes} << 16 | uint64_t{sizeof(tpf::Control)};

struct Header {
  uint64_t magic;
  uint64_t layout;
  uint64_t bytes;
  uint64_t token;
};
static_assert(sizeof(Header) <= TPF_SEGMENT_HEADER_BYTES);

// False, with errno set, where no file has so many bytes.
bool file_bytes(int64_t bytes, int64_t* total) {
  if (bytes <= 0) return errno = EINVAL, false;
  if (__builtin_add_overflow(bytes, int64_t{TPF_SEGMENT_HEADER_BYTES}, total)) return errno = EFBIG, false;
  return true;
}

Header* header_of(const tpf_segment& segment) {
  return reinterpret_cast<Header*>(static_cast<char*>(segment.base) - TPF_SEGMENT_HEADER_BYTES);
}

tpf_status map(tpf_segment* segment, int fd, int64_t bytes) {
  void* memory =
      mmap(nullptr, static_cast<size_t>(bytes + TPF_SEGMENT_HEADER_BYTES), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return errno == ENOMEM ? TPF_NO_SPACE : TPF_SYSTEM;
  *segment = {static_cast<char*>(memory) + TPF_SEGMENT_HEADER_BYTES, bytes, fd, -1};
  return TPF_OK;
}

// Sizes the new file, maps it and writes its header.
tpf_status fill(tpf_segment* segment, int fd, int64_t bytes, uint64_t token) {
  int64_t total = 0;
  if (!file_bytes(bytes, &total)) return errno == EFBIG ? TPF_NO_SPACE : TPF_SYSTEM;
  if (fchmod(fd, 0600) != 0) return TPF_SYSTEM;  // whatever the umask has taken away
  // Pages are taken now: without this a full /dev/shm is a SIGBUS in the middle of a call.
  if (const int error = posix_fallocate(fd, 0, total); error != 0) {
    errno = error;
    return error == ENOSPC || error == ENOMEM || error == EFBIG ? TPF_NO_SPACE : TPF_SYSTEM;
  }
  const tpf_status status = map(segment, fd, bytes);
  if (status == TPF_OK) *header_of(*segment) = {kMagic, kLayout, static_cast<uint64_t>(bytes), token};
  return status;
}

bool same(const char* check, uint64_t found, uint64_t expected, int32_t base, tpf_refusal* refusal) {
  if (found == expected) return true;
  *refusal = {check, found, expected, base};
  return false;
}

// What the file system knows. Before the file is mapped: memory behind the end of a shorter one would be a SIGBUS.
tpf_status examine(int fd, int64_t total, tpf_refusal* refusal) {
  struct stat file = {};
  if (fstat(fd, &file) != 0) return TPF_SYSTEM;
  const bool passed = same("file type", file.st_mode & S_IFMT, S_IFREG, 8, refusal) &&
                      same("owner's user id", file.st_uid, geteuid(), 10, refusal) &&
                      same("mode", file.st_mode & 07777, 0600, 8, refusal) &&
                      same("size", static_cast<uint64_t>(file.st_size), static_cast<uint64_t>(total), 10, refusal);
  return passed ? TPF_OK : TPF_REFUSED;
}

// What its creator has written.
tpf_status examine(const Header& header, int64_t bytes, uint64_t token, tpf_refusal* refusal) {
  const bool passed = same("magic number", header.magic, kMagic, 16, refusal) &&
                      same("layout version", header.layout, kLayout, 16, refusal) &&
                      same("recorded size", header.bytes, static_cast<uint64_t>(bytes), 10, refusal) &&
                      same("token", header.token, token, 16, refusal);
  return passed ? TPF_OK : TPF_REFUSED;
}

// Gives up what has come of a segment; errno stays.
tpf_status drop(tpf_segment* segment, int fd, tpf_status status) {
  const int error = errno;
  if (segment->base != nullptr) {
    tpf_segment_close(segment);
  } else {
    close(fd);
  }
  errno = error;
  return status;
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

int32_t tpf_version(void) { return TPF_VERSION; }

int64_t tpf_sizeof(const char* name) {
  static constexpr std::pair<const char*, size_t> kStructs[] = {
      {"tpf_call", sizeof(tpf_call)},
      {"tpf_fault", sizeof(tpf_fault)},
      {"tpf_team", sizeof(tpf_team)},
      {"tpf_symm", sizeof(tpf_symm)},
      {"tpf_card", sizeof(tpf_card)},
      {"tpf_plan", sizeof(tpf_plan)},
      {"tpf_segment", sizeof(tpf_segment)},
      {"tpf_refusal", sizeof(tpf_refusal)},
      {"tpf_stream_order", sizeof(tpf_stream_order)},
      {"tpf_projection", sizeof(tpf_projection)},
      {"tpf_quantization", sizeof(tpf_quantization)},
  };
  for (const auto& [known, bytes] : kStructs) {
    if (std::strcmp(known, name) == 0) return static_cast<int64_t>(bytes);
  }
  return 0;
}

void tpf_rows_of(int64_t* start, int64_t* count, int64_t num_tokens, int32_t rank, int32_t world_size) {
  *start = *count = 0;
  if (num_tokens < 0 || rank < 0 || rank >= world_size) return;
  const tpf::Rows rows = tpf::rows_of(num_tokens, rank, world_size);
  *start = rows.start;
  *count = rows.count;
}

void tpf_columns_of(int64_t* start, int64_t* count, const tpf_call* call, int32_t rank, int32_t world_size) {
  tpf::Rows columns = {};
  if (world_size > 0 && rank >= 0 && rank < world_size) columns = tpf::latent_columns_of(*call, rank, world_size);
  *start = columns.start;
  *count = columns.count;
}

int64_t tpf_region_bytes(int64_t slot_bytes, int32_t on_cuda) {
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max() - tpf::region_bytes(0, false);
  if (slot_bytes < 0 || slot_bytes > kLargest / 2 - tpf::kMaxInboxBytes) return -1;
  return tpf::region_bytes(slot_bytes, on_cuda != 0);
}

tpf_status tpf_segment_create(tpf_segment* segment, const char* name, int64_t bytes, uint64_t token) {
  *segment = {nullptr, 0, -1, -1};
  const int fd = shm_open(name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) return TPF_SYSTEM;
  const tpf_status status = fill(segment, fd, bytes, token);
  if (status == TPF_OK) return status;
  const int error = errno;
  shm_unlink(name);
  errno = error;
  return drop(segment, fd, status);
}

tpf_status tpf_segment_open(tpf_segment* segment, const char* name, int64_t bytes, uint64_t token,
                            tpf_refusal* refusal) {
  *segment = {nullptr, 0, -1, -1};
  int64_t total = 0;
  if (!file_bytes(bytes, &total)) return TPF_SYSTEM;
  const int fd = shm_open(name, O_RDWR | O_CLOEXEC, 0);  // a symbolic link is an error of shm_open's own
  if (fd < 0) return TPF_SYSTEM;
  tpf_status status = examine(fd, total, refusal);
  if (status == TPF_OK) status = map(segment, fd, bytes);
  if (status == TPF_OK) status = examine(*header_of(*segment), bytes, token, refusal);
  return status == TPF_OK ? status : drop(segment, fd, status);
}

tpf_status tpf_segment_unlink(const char* name) { return shm_unlink(name) == 0 ? TPF_OK : TPF_SYSTEM; }

void tpf_segment_close(tpf_segment* segment) {
  if (segment->base == nullptr) return;
  munmap(header_of(*segment), static_cast<size_t>(segment->bytes) + TPF_SEGMENT_HEADER_BYTES);
  tpf::release_lock(segment->lock_fd);
  close(segment->fd);
  *segment = {nullptr, 0, -1, -1};
}
