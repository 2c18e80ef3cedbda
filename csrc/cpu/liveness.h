// Who lives: every rank holds a lock on its byte of the segment, which the kernel drops when the process ends.
#pragma once

namespace tpf {

// Whether nobody holds the lock of `rank`.
bool died(int segment_fd, int rank);

// Closes a lock that tpf_segment_hold has taken; -1: none.
void release_lock(int fd);

}  // namespace tpf
