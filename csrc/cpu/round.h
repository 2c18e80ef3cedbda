// One rank's part in a round of the protocol (csrc/protocol.h), on the CPU.
#pragma once
#include "../protocol.h"

namespace tpf {

class Round {
 public:
  Round(const tpf_team& team, const tpf_call& call);

  // Opens the op's first round, or its next one. Fails where this workspace, or a peer, has given up before.
  tpf_status begin();
  tpf_status begin_next();
  // Publishes `step` to every peer and waits for theirs.
  tpf_status meet(int step);
  // Closes the round. Ops whose peers read `input` in place meet once more first.
  tpf_status end(bool zero_copy);

  char* slot(int rank) const { return tpf::slot(team_.region[rank], epoch_, team_.slot_bytes); }
  Rows rows(int rank) const { return rows_of(call_.num_tokens, rank, team_.world_size); }
  int rank() const { return team_.rank; }
  int world_size() const { return team_.world_size; }

 private:
  void announce();
  tpf_status fail(tpf_status status, int peer, int step, uint64_t seen, int64_t waited_ns);

  const tpf_team& team_;
  const tpf_call& call_;
  const uint32_t fingerprint_;
  Control* const own_;
  uint32_t epoch_ = 0;
};

}  // namespace tpf
