// barrier_kernel: a round without rows, its signal fenced as if there were some, and launched as early as small calls
// are. The benchmark's yardstick for those.
#include "../comm/signal.cuh"
#include "../launch.cuh"

namespace tpf {
namespace {

struct BarrierArgs {
  tpf_team team;
  tpf_call call;
  uint32_t fingerprint;
};

__global__ void barrier_kernel(const __grid_constant__ BarrierArgs args) {
  pdl_wait();
  const BlockRound round = begin_op(args.team, args.call, args.fingerprint, 1);
  const int peer = threadIdx.x;
  if (!round.refused && peer < args.team.world_size && peer != args.team.rank) {
    publish_step(args.team, round, 0, peer);
    wait_step(args.team, args.call, round, 0, blockIdx.x, peer);
  }
  __syncwarp();  // lanes without a peer may be ahead of those that still wait
  pdl_trigger();
  round.refused ? end_faulted_op(args.team, args.call, round) : end_op(args.team);
}

}  // namespace
}  // namespace tpf

tpf_status tpf_barrier_cuda(const tpf_team* team, tpf_stream stream) {
  using namespace tpf;
  const OnDevice on_device(team->device);
  if (on_device.status != TPF_OK) return on_device.status;
  const tpf_card& card = on_device.card;
  BarrierArgs args = {};
  args.team = *team;
  args.call.op = TPF_BARRIER;
  args.call.source = -1;
  args.fingerprint = fingerprint_of(args.call);
  Grid grid = {1, 32};
  grid.pdl = true;
  return launch_kernel(barrier_kernel, args, card, grid, stream);
}
