/* The C API without torch: two ranks, here threads of one process, reduce-scatter, add and norm rows on the CPU.
 *
 *     cc -I csrc examples/c_api.c -L tp_fused -ltp_fused -Wl,-rpath,$PWD/tp_fused -pthread -o build/c_api
 *     build/c_api
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tp_fused.h"

enum { RANKS = 2, TOKENS = 5, HIDDEN = 64, MOST_ROWS = 3 };

static tpf_team teams[RANKS];

/* What a rank does. Its partial sums are 1 + rank everywhere: the sum of both ranks is 3, and its norm 1. */
static void* run(void* argument) {
  const tpf_team* team = argument;
  float input[TOKENS * HIDDEN], weight[HIDDEN], output[MOST_ROWS * HIDDEN], sums[MOST_ROWS * HIDDEN];
  for (int i = 0; i < TOKENS * HIDDEN; ++i) input[i] = 1.0f + team->rank;
  for (int i = 0; i < HIDDEN; ++i) weight[i] = 1.0f;
  const tpf_status status =
      tpf_rs_rmsnorm_cpu(output, sums, input, NULL, NULL, weight, team, TOKENS, HIDDEN, TPF_F32, 1e-6f, 0.0f, 0);
  int64_t start, count;
  tpf_rows_of(&start, &count, TOKENS, team->rank, team->world_size);
  if (status != TPF_OK) {
    const tpf_fault fault = tpf_team_fault_cpu(team, team->rank);
    printf("rank %d: status %d, about rank %d\n", team->rank, status, fault.peer);
  } else {
    printf("rank %d: rows %d to %d, sum %g, norm %.3f\n", team->rank, (int)start, (int)(start + count), sums[0],
           output[0]);
  }
  return NULL;
}

int main(void) {
  if (!tpf_cpu_supported()) return 1; /* AVX2 */
  const int64_t slot_bytes = 4096;    /* of RANKS * MOST_ROWS rows, in whole pages */
  const int64_t bytes = tpf_region_bytes(slot_bytes, 0);
  void* region[RANKS];
  for (int rank = 0; rank < RANKS; ++rank) {
    region[rank] = memset(aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), 0, bytes); /* ranks begin with zeros */
  }
  pthread_t threads[RANKS];
  for (int rank = 0; rank < RANKS; ++rank) {
    teams[rank] = (tpf_team){.rank = rank,
                             .world_size = RANKS,
                             .slot_bytes = slot_bytes,
                             .timeout_ns = 5000000000,
                             .liveness_fd = -1,
                             .device = -1};
    memcpy(teams[rank].region, region, sizeof region);
    pthread_create(&threads[rank], NULL, run, &teams[rank]);
  }
  for (int rank = 0; rank < RANKS; ++rank) pthread_join(threads[rank], NULL);

  /* What a call would launch on cards that are not there. */
  tpf_card card;
  tpf_plan plan;
  const tpf_call call = {
      .op = TPF_RS_RMSNORM, .dtype = TPF_BF16, .num_tokens = 16384, .hidden_size = 7168, .source = 0};
  /* .source = 0: the input lies in symmetric memory, and the peers read it in place. */
  tpf_team eight = {.world_size = 8, .slot_bytes = (int64_t)16384 * 7168 * 2};
  if (tpf_card_named(&card, "H200") != TPF_OK) return 1;
  eight.max_ctas = card.sm_count;
  if (tpf_plan_call(&plan, &call, &eight, &card) != TPF_OK) return 1;
  printf("8 x H200: %d blocks of %d threads\n", plan.blocks, plan.threads);
  for (int rank = 0; rank < RANKS; ++rank) free(region[rank]);
  return 0;
}
