/* The C API of libtp_fused: plain structs, explicit pointers, status codes. No torch, no Python, no globals.
 *
 * Every op takes its outputs, its inputs, the team and the scalars, in this order. Pointers to row-major contiguous
 * rows; sizes in elements unless a name says bytes. The caller has checked shapes, dtypes and devices
 * (tp_fused/ops.py).
 */
#ifndef TP_FUSED_H_
#define TP_FUSED_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default) /* all else in the library is hidden */

#define TPF_VERSION 100 /* 10000 * major + 100 * minor + patch, of tp_fused/_version.py */

#define TPF_MAX_RANKS 8           /* ranks of one workspace: the GPUs of one node */
#define TPF_MAX_CTAS 256          /* blocks of one grid that synchronise with their peers */
#define TPF_MAX_ROW_BLOCKS 512    /* of 64 to 256 rows, that a rank has in a fused projection */
#define TPF_MAX_STEPS 16          /* synchronisations of one round: staging chunks, closing */
#define TPF_MAX_HIDDEN_SIZE 16384 /* widest row the reduce kernels take */

typedef enum tpf_status {
  TPF_OK = 0,
  /* Faults of a collective. The record is in the caller's own region: tpf_team_fault. */
  TPF_NEVER_ARRIVED = 1, /* a peer did not come before the deadline */
  TPF_DISAGREE = 2,      /* a peer calls something else */
  TPF_PEER_FAULTED = 3,  /* a peer has given up a call: its own record says why */
  TPF_PEER_CLOSED = 4,   /* a peer closed its workspace */
  TPF_PEER_DIED = 5,     /* a peer's process has ended */
  TPF_INTERRUPTED = 6,   /* a signal ended this rank's wait: tpf_team.interrupted */
  TPF_OVERLAP = 7,       /* CUDA: a call began before the workspace's call before it had ended: two streams */
  TPF_CLOSED = 8,        /* CUDA: this rank's workspace was closed, and a graph of that time is replayed */
  /* Errors of set-up. errno says more. */
  TPF_NO_SPACE = 16,
  TPF_SYSTEM = 17,
  TPF_UNSUPPORTED = 18,
  TPF_CUDA_ERROR = 19, /* tpf_cuda_error_string says which */
  TPF_REFUSED = 20,    /* a segment is not the one that is meant: tpf_refusal says why */
} tpf_status;

typedef enum tpf_dtype { TPF_BF16 = 0, TPF_F16 = 1, TPF_F32 = 2, TPF_E4M3 = 3, TPF_U8 = 4 } tpf_dtype;

typedef enum tpf_op {
  TPF_RS_RMSNORM = 1,
  TPF_RS_RMSNORM_FP8 = 2,
  TPF_RS_RMSNORM_AG = 3,
  TPF_QKV_A_PROJ_AG = 4,
  TPF_QKV_A_PROJ_AG_FP8 = 5,
  TPF_QKV_A_PROJ_AG_NORM = 6,
  TPF_REDUCE_SCATTER_ROWS = 7,
  TPF_ALL_GATHER_ROWS = 8,
  TPF_BARRIER = 9,
  TPF_QKV_A_PROJ_AG_NORM_FP8 = 10,
} tpf_op;

/* Bits of tpf_call.variant. */
#define TPF_COMPLETE 1u      /* the input is already reduced on every rank */
#define TPF_RESIDUAL 2u      /* a residual is added */
#define TPF_COLUMN_SCALES 4u /* fp8 scales are column-major */
#define TPF_KEEP_OUTPUT 8u   /* the fp8 form also writes the normalised rows */
#define TPF_BIAS 16u
#define TPF_FUSED 32u         /* a projection's product and gather are one kernel */
#define TPF_FLOAT_WEIGHT 64u  /* the norms' weights are fp32, the rows are not */
#define TPF_ROUND_SCALES 128u /* fp8 scales are powers of two */
#define TPF_GATHERED 256u     /* the fp8 form quantises all rows, on every rank. CUDA */

/* What a rank says it is calling. All ranks must say the same; a 32-bit hash of it travels with every signal. */
typedef struct tpf_call {
  uint16_t op;
  uint16_t dtype;
  float eps; /* of a norm; 0 elsewhere. Functions that are given it, and weight_offset, write it here themselves */
  int64_t num_tokens;
  uint32_t hidden_size; /* columns of the input */
  uint32_t columns;     /* columns of a projection, 0 elsewhere */
  uint32_t group_size;  /* columns that share an fp8 scale; 0 elsewhere */
  uint32_t variant;
  uint32_t kv_columns; /* of kv_a in qkv_a_proj_ag_norm; 0 elsewhere */
  uint32_t buffer;     /* the symmetric buffer that the input is read in; 0 where it is staged */
  int64_t source;      /* -1: input staged; else its offset in that buffer, read there in place */
  uint32_t q_columns;  /* of q_a in qkv_a_proj_ag_norm; 0 elsewhere */
  float weight_offset; /* of a norm; 0 elsewhere */
} tpf_call;

typedef struct tpf_fault {
  int32_t status; /* tpf_status */
  int32_t rank;   /* who writes this record */
  int32_t peer;   /* about whom */
  uint32_t step;  /* which synchronisation of the round */
  uint32_t epoch; /* the round */
  uint32_t seen_epoch;
  uint64_t call_number; /* calls on this workspace, from 1, modulo 2^32 */
  int64_t waited_ns;
  tpf_call expected; /* what this rank calls */
  tpf_call seen;     /* what the peer calls; only with TPF_DISAGREE */
} tpf_fault;

/* One rank's view of a workspace. region[r] is rank r's symmetric allocation as mapped here. */
typedef struct tpf_team {
  int32_t rank;
  int32_t world_size;
  void* region[TPF_MAX_RANKS];
  int64_t slot_bytes; /* of one staging slot; there are two */
  int64_t timeout_ns;
  int32_t max_ctas;    /* 0: as many as the kernel likes */
  int32_t liveness_fd; /* CPU: the segment's descriptor, whose locks tell who lives; -1: unknown */
  int32_t device;      /* CUDA: the ordinal; -1: the CPU backend */
  tpf_fault* mailbox;  /* CUDA: pinned host memory, zeroed; the kernel's fault record arrives there, status last */
  int32_t (*interrupted)(void); /* CPU: a wait asks it some times a second, and ends where it is not 0; may be NULL */
  int32_t free_sms;         /* CUDA: a card's SMs less its other ranks' blocks; 0: clusters of any size are launched */
  int32_t free_cluster_sms; /* likewise of tpf_card's cluster_sms */
} tpf_team;

/* An input that lies in symmetric memory: at `offset` in every rank's base[r]. */
typedef struct tpf_symm {
  void* base[TPF_MAX_RANKS];
  int64_t offset;
  uint32_t buffer; /* which of the workspace's symmetric buffers, from 1; the same number on all ranks */
} tpf_symm;

/* ---- which build this is: for programs that load it without having been compiled with its header ---- */
int32_t tpf_version(void);            /* its TPF_VERSION */
int64_t tpf_sizeof(const char* name); /* of a struct that callers fill in, tpf_team for one; 0 where there is none */

/* ---- the row rule and the layout of a region ---- */
/* No rows where num_tokens is negative or there is no such rank. */
void tpf_rows_of(int64_t* start, int64_t* count, int64_t num_tokens, int32_t rank, int32_t world_size);
/* The columns of a projection that a rank multiplies of rows that all ranks have. None where there is no such rank. */
void tpf_columns_of(int64_t* start, int64_t* count, const tpf_call* call, int32_t rank, int32_t world_size);
/* -1 where slot_bytes is negative or that is more than an int64_t takes. */
int64_t tpf_region_bytes(int64_t slot_bytes, int32_t on_cuda);

/* ---- plans: what a call would launch ---- */

/* A card, as far as plans depend on it. */
typedef struct tpf_card {
  int32_t architecture; /* 80, 90, 100 or 120: of the code that runs on it, which may be older than the card */
  int32_t sm_count;
  int32_t cluster_sms;  /* those that clusters of eight blocks fill, a block an SM: some SMs are in no such cluster */
  int64_t shared_bytes; /* that a block may have */
  int32_t has_wgmma;    /* sm_90's matrix instructions, and code for them */
} tpf_card;

/* One that is known by name: A100, H20, H100, H200, B200, RTX PRO 6000. Or this machine's, with code of this build. */
tpf_status tpf_card_named(tpf_card* card, const char* name);
tpf_status tpf_card_of(tpf_card* card, int32_t device);

typedef enum tpf_body {
  TPF_DIRECT = 0,   /* load and store 16 bytes at a time */
  TPF_ONE_ROW = 1,  /* a block, or a cluster of blocks, has one row; or a block has a few, all of them posted */
  TPF_BULK = 2,     /* TMA moves rows through shared memory */
  TPF_TILES = 3,    /* tensor cores multiply tiles, and finished rows are gathered meanwhile */
  TPF_ALL_ROWS = 4, /* every rank adds up all rows that all ranks are to have: one synchronisation, not two */
  TPF_COLUMNS = 5,  /* tensor cores multiply all rows by some of the weight's, and post the columns */
} tpf_body;

typedef struct tpf_plan {
  int32_t body; /* tpf_body */
  int32_t blocks, threads;
  int32_t cluster;      /* blocks that share a row, or ask for the same weights */
  int32_t vectors;      /* of 16 bytes of a row, that a thread of a reduction holds; else 0 */
  int32_t chunk_rows;   /* of a block, that are published together; of a projection, of a rank */
  int32_t chunks;       /* of a block, or of the rank with most rows */
  int32_t stages;       /* TPF_BULK, reductions: row buffers of the ring */
  int64_t shared_bytes; /* dynamic, of a block */
  int64_t source;       /* as in tpf_call */
  int32_t tile_columns; /* TPF_TILES, TPF_COLUMNS (a cluster's); with chunk_rows rows */
  int32_t few_rows;     /* a projection with another body: whether since that takes less time; 0: no kernel does both */
  int32_t rounds;       /* of csrc/protocol.h, that the launch counts: 1 or 2 */
  int32_t ranks;        /* TPF_ONE_ROW, TPF_ALL_ROWS: that the kernel is compiled for; 0: any number */
} tpf_plan;

/* A function of its arguments alone. Of team it reads world_size, max_ctas, slot_bytes and both free_ fields. */
tpf_status tpf_plan_call(tpf_plan* plan, const tpf_call* call, const tpf_team* team, const tpf_card* card);

/* ---- shared-memory segments (CPU) ---- */
/* A segment begins with a page that says whose it is; base points behind it, at `bytes` bytes for the caller. */
#define TPF_SEGMENT_VERSION 1 /* of that page and of the regions behind it */
#define TPF_SEGMENT_HEADER_BYTES 4096

typedef struct tpf_segment {
  void* base;
  int64_t bytes;
  int32_t fd;
  int32_t lock_fd; /* of tpf_segment_hold; -1: not held */
} tpf_segment;

/* The first check that a segment did not pass. */
typedef struct tpf_refusal {
  const char* check; /* a name with static storage */
  uint64_t found, expected;
  int32_t base; /* in which people write such numbers: 8, 10 or 16 */
} tpf_refusal;

int32_t tpf_cpu_supported(void);
/* Zeroed, mode 0600, under a name that nobody has yet. token: a random number that goes to the openers with the name.
 */
tpf_status tpf_segment_create(tpf_segment* segment, const char* name, int64_t bytes, uint64_t token);
/* Only a regular file of this user, of exactly this size, that nobody else may open and that was created by this
 * version of the library with this token; else TPF_REFUSED, and `refusal` is filled in. */
tpf_status tpf_segment_open(tpf_segment* segment, const char* name, int64_t bytes, uint64_t token,
                            tpf_refusal* refusal);
tpf_status tpf_segment_unlink(const char* name);
void tpf_segment_close(tpf_segment* segment);
/* Says, until this process ends or closes the segment, that `rank` lives. */
tpf_status tpf_segment_hold(tpf_segment* segment, int32_t rank);

/* ---- a rank's own state (CPU) ---- */
void tpf_team_close_cpu(const tpf_team* team);
/* A rank's record; status is TPF_OK where nothing has gone wrong. The caller's own is TPF_PEER_FAULTED from the moment
 * on at which a peer gives up, whether or not the caller has called anything since. */
tpf_fault tpf_team_fault_cpu(const tpf_team* team, int32_t rank);
/* Where the next round's staging rows of this rank begin: ops that compute into the slot write there first. */
void* tpf_next_slot_cpu(const tpf_team* team);

/* ---- ops (CPU) ---- */
/* output, residual_out: [rows, hidden_size]. input: [num_tokens, hidden_size]. input_symm: NULL where the input is
 * staged. residual: this rank's rows, used with TPF_RESIDUAL. weight: [hidden_size], of dtype or, with
 * TPF_FLOAT_WEIGHT, fp32; weight_offset is added to it in fp32. variant: the TPF_ bits above, the same on all ranks. */
tpf_status tpf_rs_rmsnorm_cpu(void* output, void* residual_out, const void* input, const tpf_symm* input_symm,
                              const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                              int32_t hidden_size, tpf_dtype dtype, float eps, float weight_offset, uint32_t variant);

/* q: [rows, hidden_size] e4m3. scale: fp32, group g of row i at i*scale_row_stride + g*scale_group_stride.
 * output: [rows, hidden_size], written with TPF_KEEP_OUTPUT. */
tpf_status tpf_rs_rmsnorm_fp8_cpu(void* q, float* scale, void* residual_out, void* output, const void* input,
                                  const tpf_symm* input_symm, const void* residual, const void* weight,
                                  const tpf_team* team, int64_t num_tokens, int32_t hidden_size, tpf_dtype dtype,
                                  float eps, float weight_offset, int32_t group_size, int64_t scale_row_stride,
                                  int64_t scale_group_stride, uint32_t variant);

/* output: [num_tokens, hidden_size]; residual_out: [rows, hidden_size]. */
tpf_status tpf_rs_rmsnorm_ag_cpu(void* output, void* residual_out, const void* input, const tpf_symm* input_symm,
                                 const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                                 int32_t hidden_size, tpf_dtype dtype, float eps, float weight_offset,
                                 uint32_t variant);

tpf_status tpf_reduce_scatter_rows_cpu(void* output, const void* input, const tpf_symm* input_symm,
                                       const void* residual, const tpf_team* team, int64_t num_tokens,
                                       int32_t hidden_size, tpf_dtype dtype, uint32_t variant);

tpf_status tpf_all_gather_rows_cpu(void* output, const void* input, const tpf_team* team, int64_t num_tokens,
                                   int32_t hidden_size, tpf_dtype dtype);

/* Quantised rows, [rows, hidden_size] of e4m3, and their scales, [rows, groups of group_size columns], in one round.
 * Both must fit a slot together: a rank's most rows of the first, 16 bytes at most, and its scales. */
tpf_status tpf_gather_quantized_cpu(void* q, float* scale, const void* own_q, const float* own_scale,
                                    const tpf_team* team, int64_t num_tokens, int32_t hidden_size, int32_t group_size);

/* The projected rows lie in tpf_next_slot_cpu already; with TPF_COMPLETE, of all rows the columns that this rank
 * multiplies: [num_tokens, columns of the rank] (tpf_columns_of). latent: [num_tokens, columns]. */
tpf_status tpf_qkv_a_proj_ag_cpu(void* latent, const tpf_team* team, const tpf_call* call);

/* q_a: [num_tokens, q_columns], kv_a: [num_tokens, kv_columns], k_pe: [num_tokens, columns - q - kv]. */
tpf_status tpf_qkv_a_proj_ag_norm_cpu(void* q_a, void* kv_a, void* k_pe, const void* q_a_weight,
                                      const void* kv_a_weight, const tpf_team* team, const tpf_call* call,
                                      int32_t q_columns, int32_t kv_columns, float eps, float weight_offset);

/* ---- on a rank alone ---- */
/* Where quantised rows go. Group g of row i has its scale at i*scale_row_stride + g*scale_group_stride. */
typedef struct tpf_quantization {
  uint8_t* q; /* e4m3 */
  float* scale;
  int64_t scale_row_stride, scale_group_stride;
  int32_t group_size;
  int32_t round_scales; /* up to powers of two */
} tpf_quantization;

/* rows: [num_rows, columns]. CUDA: bf16, groups of 128. */
tpf_status tpf_quantize_rows_cpu(const tpf_quantization* to, const void* rows, int64_t num_rows, int32_t columns,
                                 tpf_dtype dtype);

/* ---- CUDA ---- */
void tpf_team_close_cuda(const tpf_team* team);
/* As tpf_team_fault_cpu. The caller's own record comes from the mailbox or, where that is empty, from its region; a
 * peer's is copied from the peer's region. Waits for none of the kernels. */
tpf_fault tpf_team_fault_cuda(const tpf_team* team, int32_t rank);

/* The streams that a workspace's calls were issued on. Zeroed at first. */
typedef struct tpf_stream_order {
  void* last;          /* of the last call that ran */
  void* last_captured; /* of the last call that was captured, in the capture of this number */
  uint64_t capture;
  int32_t any;      /* there is a last one */
  int32_t captured; /* some call was captured in a graph */
} tpf_stream_order;

/* Makes the next call, on `stream`, follow the last one: where the streams differ, `stream` waits for the work that the
 * other one has been given so far. Before every launch. */
tpf_status tpf_follow_stream_cuda(tpf_stream_order* order, const tpf_team* team, void* stream);

/* ---- ops (CUDA): as above, on a stream (a cudaStream_t). Outputs of a call that faults are filled with NaN ---- */
typedef void* tpf_stream;
int32_t tpf_cuda_compiled(void);
int32_t tpf_cuda_has_code(int32_t device); /* whether this build was compiled for that card */
const char* tpf_cuda_error_string(void);   /* of this thread's last TPF_CUDA_ERROR */

tpf_status tpf_rs_rmsnorm_cuda(void* output, void* residual_out, const void* input, const tpf_symm* input_symm,
                               const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                               int32_t hidden_size, tpf_dtype dtype, float eps, float weight_offset, uint32_t variant,
                               tpf_stream stream);

/* With TPF_GATHERED q and scale are of all tokens on every rank, in one synchronisation; residual_out and output are of
 * this rank's rows as ever. TPF_UNSUPPORTED, before anything is launched, where no kernel does that, and always on the
 * CPU: then without it, and gather. */
tpf_status tpf_rs_rmsnorm_fp8_cuda(void* q, float* scale, void* residual_out, void* output, const void* input,
                                   const tpf_symm* input_symm, const void* residual, const void* weight,
                                   const tpf_team* team, int64_t num_tokens, int32_t hidden_size, tpf_dtype dtype,
                                   float eps, float weight_offset, int32_t group_size, int64_t scale_row_stride,
                                   int64_t scale_group_stride, uint32_t variant, tpf_stream stream);

tpf_status tpf_rs_rmsnorm_ag_cuda(void* output, void* residual_out, const void* input, const tpf_symm* input_symm,
                                  const void* residual, const void* weight, const tpf_team* team, int64_t num_tokens,
                                  int32_t hidden_size, tpf_dtype dtype, float eps, float weight_offset,
                                  uint32_t variant, tpf_stream stream);

tpf_status tpf_reduce_scatter_rows_cuda(void* output, const void* input, const tpf_symm* input_symm,
                                        const void* residual, const tpf_team* team, int64_t num_tokens,
                                        int32_t hidden_size, tpf_dtype dtype, uint32_t variant, tpf_stream stream);

tpf_status tpf_all_gather_rows_cuda(void* output, const void* input, const tpf_team* team, int64_t num_tokens,
                                    int32_t hidden_size, tpf_dtype dtype, tpf_stream stream);

tpf_status tpf_gather_quantized_cuda(void* q, float* scale, const void* own_q, const float* own_scale,
                                     const tpf_team* team, int64_t num_tokens, int32_t hidden_size, int32_t group_size,
                                     tpf_stream stream);

/* What a projection multiplies with. input: [rows, hidden_size]; weight: [columns, hidden_size]; bias: [columns] or
 * NULL. e4m3: scale, group g of row i at i*scale_row_stride + g*scale_group_stride; weight_scale: [columns/128,
 * hidden/128], both rounded up. qkv_a_proj_ag_norm: the weights of the two norms and their columns; q_a_scale: of a
 * call with a group_size, where q_a's scales go, group g of row i at i*q_a_scale_row_stride + g*q_a_scale_group_stride.
 */
typedef struct tpf_projection {
  const void* input;
  const float* scale;
  int64_t scale_row_stride, scale_group_stride;
  const void* weight;
  const float* weight_scale;
  const void* bias;
  const void* q_a_weight;
  const void* kv_a_weight;
  int32_t q_columns, kv_columns;
  float eps, weight_offset;
  float* q_a_scale;
  int64_t q_a_scale_row_stride, q_a_scale_group_stride;
} tpf_projection;

/* qkv_a_proj_ag and its other forms in one kernel: call->op says which. outputs: latent, or q_a, kv_a and k_pe; q_a is
 * e4m3 where q_a_scale is given, which takes a group_size of 128 and columns of q_a that are a multiple of 512. e4m3
 * has no weight_offset. TPF_UNSUPPORTED, before anything is launched, where that kernel does not serve, or not with
 * q_a_scale or its strides: then project and gather, and quantise. */
tpf_status tpf_qkv_a_proj_ag_cuda(void* const outputs[3], const tpf_projection* projection, const tpf_team* team,
                                  const tpf_call* call, tpf_stream stream);

/* The gathering halves of the projections. rows: this rank's projected rows, [rows, columns]; in
 * tpf_gather_latent_norm_cuda their owner normalises them on the way. The rest as in tpf_qkv_a_proj_ag_cpu. */
tpf_status tpf_gather_latent_cuda(void* latent, const void* rows, const tpf_team* team, const tpf_call* call,
                                  tpf_stream stream);
tpf_status tpf_gather_latent_norm_cuda(void* q_a, void* kv_a, void* k_pe, const void* rows, const void* q_a_weight,
                                       const void* kv_a_weight, const tpf_team* team, const tpf_call* call,
                                       int32_t q_columns, int32_t kv_columns, float eps, float weight_offset,
                                       tpf_stream stream);

tpf_status tpf_quantize_rows_cuda(const tpf_quantization* to, const void* rows, int64_t num_rows, int32_t columns,
                                  tpf_dtype dtype, int32_t device, tpf_stream stream);

/* All ranks' kernels meet once, in one block. */
tpf_status tpf_barrier_cuda(const tpf_team* team, tpf_stream stream);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif /* TP_FUSED_H_ */
