// The arguments of the kernels that gather, put together.
#pragma once
#include "../launch.cuh"
#include "all_gather_rows.cuh"

namespace tpf {

inline GatherArgs gather_args(const void* input, const tpf_team* team, const tpf_call& call) {
  GatherArgs args = {};
  args.input = static_cast<const char*>(input);
  args.team = *team;
  args.call = call;
  args.fingerprint = fingerprint_of(call);
  args.partition = partition_of(call.num_tokens, team->world_size);
  return args;
}

// input: of a part that is a tensor of its own.
inline void add_part(GatherArgs& args, void* output, const void* weight, int64_t row_bytes,
                     const void* input = nullptr) {
  GatherPart& part = args.parts[args.num_parts++];
  part = {static_cast<char*>(output), weight, row_bytes, args.row_bytes, 0, static_cast<const char*>(input)};
  for (int p = 0; p + 1 < args.num_parts; ++p) {
    part.slot_offset += (args.partition.largest() * args.parts[p].row_bytes + 15) / 16 * 16;
  }
  args.row_bytes += row_bytes;
}

}  // namespace tpf
