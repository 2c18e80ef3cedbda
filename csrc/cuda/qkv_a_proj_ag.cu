#include <cudaTypedefs.h>

#include <limits>

#include "launch.cuh"
#include "qkv_a_proj_ag_kernel.cuh"

namespace tpf {
namespace {

// libcuda is not linked to: torch, or whoever calls, has loaded it.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)
                                                 : nullptr;
  }();
  return found;
}

// Boxes of `box_rows` rows by 128 bytes of a row-major [rows, hidden_size]; what lies outside reads as 0.
bool encode(CUtensorMap* map, const tpf_call& call, const void* base, int64_t rows, uint32_t box_rows) {
  const CUtensorMapDataType type = call.dtype == TPF_BF16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : call.dtype == TPF_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (plan_instead()) return true;  // there is no tensor then
  const cuuint64_t element_bytes = bytes_of(static_cast<tpf_dtype>(call.dtype));
  const cuuint64_t sizes[2] = {call.hidden_size, static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {call.hidden_size * element_bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(kSwizzleBytes / element_bytes), box_rows};
  const cuuint32_t steps[2] = {1, 1};
  return encoder()(map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

int tiles(int64_t size, int tile) { return static_cast<int>((size + tile - 1) / tile); }

bool begins_at_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Tiles>
int64_t row_blocks_of(const ProjectionArgs& args) {
  return std::max(1, tiles(args.partition.largest(), Tiles::kRows));
}

// What tiles of this kind can do: rows that are normed are copied whole.
template <typename Tiles>
bool serve(const ProjectionArgs& args) {
  using Bytes = SharedBytes<Tiles, true>;
  const bool whole_rows = args.call.op == TPF_QKV_A_PROJ_AG_NORM;
  return row_blocks_of<Tiles>(args) <= TPF_MAX_ROW_BLOCKS &&
         !(whole_rows && args.call.columns * 2 > Bytes::buffer_bytes(Bytes::kBuffers));
}

template <typename Tiles>
tpf_status launch(ProjectionArgs& args, const Device& device, int blocks, const tpf_projection& projection,
                  tpf_stream stream) {
  using Out = std::conditional_t<Tiles::kScaled, __nv_bfloat16, typename Tiles::In>;
  const int64_t rows = args.partition.rows(args.team.rank).count;
  if (!serve<Tiles>(args)) return TPF_UNSUPPORTED;
  args.row_blocks = static_cast<int32_t>(row_blocks_of<Tiles>(args));
  args.column_tiles = tiles(args.call.columns, Tiles::kColumns);
  if (!encode(&args.weight_map, args.call, projection.weight, args.call.columns, Tiles::kWeightBox) ||
      (Tiles::kSpare > 0 && !encode(&args.spare_map, args.call, projection.weight, args.call.columns, Tiles::kSpare)) ||
      (rows > 0 && !encode(&args.input_map, args.call, projection.input, rows, Tiles::kRows))) {
    return TPF_UNSUPPORTED;
  }
  Grid grid = {blocks, kProjectionThreads, SharedBytes<Tiles, false>::kAll};
  // Where ranks share a card, a rank's blocks would lie among the others'. In pairs, neighbouring SMs ask for the same
  // weights, and a call takes less time. A grid that has the card to itself gained nothing.
  if (blocks % 2 == 0 && blocks <= device.processors / 2 && cluster_fits(args.team, 2, blocks)) grid.cluster = 2;
  tpf_status status = TPF_UNSUPPORTED;
  if (args.call.op != TPF_QKV_A_PROJ_AG_NORM) {
    status = launch_kernel(qkv_a_proj_ag_kernel<Tiles, Out, false>, args, device, grid, stream);
  } else if constexpr (!Tiles::kScaled) {
    grid.shared_bytes = SharedBytes<Tiles, true>::kAll;
    status = launch_kernel(qkv_a_proj_ag_kernel<Tiles, Out, true>, args, device, grid, stream);
  }
  if (tpf_plan* plan = plan_instead()) {
    plan->tile_rows = Tiles::kRows;
    plan->tile_columns = Tiles::kColumns;
  }
  return status;
}

// About the time of a call, in cycles. A block reads its operands at so many bytes a cycle and multiplies meanwhile; of
// fp8 it waits for each product. Ranks that share a card read a weight each, so fewer bytes a cycle, and what they copy
// goes the same way: the two add up. Where a rank has a card to itself, the rows that are complete before the last turn
// of tiles are copied meanwhile, which fp8 products are not long enough to hide all of, and the others after it; or,
// where copying takes longest, all of them after the first ones are complete. Fitted to times on H100 of 64 to 16384
// tokens, each kind of tile forced: of a rank alone, of four and eight that share the card, and of two with a card
// each; 16-bit WideTiles came later, and take what this says where ranks share a card. fp8's were fitted anew, alone
// and on two H200 (docs/performance.md).
template <typename Tiles>
int64_t cost_of(const ProjectionArgs& args, int blocks) {
  if (!serve<Tiles>(args)) return std::numeric_limits<int64_t>::max();
  const int64_t row_blocks = row_blocks_of<Tiles>(args);
  const int64_t column_tiles = tiles(args.call.columns, Tiles::kColumns), group = kGrouped * column_tiles;
  const int64_t turns = tiles(row_blocks * column_tiles, blocks);
  const int product = Tiles::kRows * Tiles::kColumns / 32;
  const int waits = Tiles::kScaled ? 260 * (first_product(Tiles::kSums) < Tiles::kSums ? 2 : 1) : 0;
  const bool shares_card = blocks <= kHalfACard;
  const int bytes_a_cycle = Tiles::kScaled ? 35 : shares_card ? 49 : 60;
  const int64_t turn = args.k_blocks * std::max(product + waits, Tiles::kStageBytes / bytes_a_cycle);
  if (args.team.world_size == 1) return turns * turn;
  // 16-bit rows. The bound is of a card: of its links or its memory.
  const int64_t copying = args.call.num_tokens * args.call.columns * 2 / std::min(12 * blocks, 250);
  if (shares_card) return turns * turn + copying;
  const int64_t first = tiles(std::min<int64_t>(row_blocks, kGrouped) * column_tiles, blocks);
  const int64_t late = row_blocks - (turns - 1) * blocks / group * kGrouped;
  const int64_t seen = 100 * late + (Tiles::kScaled ? 23 : 0) * (row_blocks - late);  // percent, of row blocks
  return std::max(turns * turn + copying * seen / (100 * row_blocks), first * turn + copying);
}

// The cheapest of these tiles, the first of several: by the shape and the grid alone, so that all ranks take the same.
template <typename... Tiles>
tpf_status launch_cheapest(ProjectionArgs& args, const Device& device, int blocks, const tpf_projection& projection,
                           tpf_stream stream) {
  const int64_t costs[] = {cost_of<Tiles>(args, blocks)...};
  constexpr decltype(&launch<LargeTiles<__half>>) launches[] = {launch<Tiles>...};
  const auto cheapest = std::min_element(std::begin(costs), std::end(costs)) - std::begin(costs);
  return launches[cheapest](args, device, blocks, projection, stream);
}

// Whether cuBLAS, and a gather after it, take less time. With few rows and many blocks all tiles are multiplied at
// once: no row is finished early enough for its way to be hidden, and cuBLAS can divide K, too. The threshold is of two
// H100 and 2112 columns (docs/performance.md). Of fp8 the product would be Triton's, with which this one has not been
// compared. By what is the same on all ranks: so not by this rank's multiprocessors.
bool product_comes_first(const ProjectionArgs& args, int blocks) {
  constexpr int64_t kFewRows = 256;
  return args.team.world_size > 1 && args.call.dtype != TPF_E4M3 && blocks > kHalfACard &&
         args.partition.largest() <= kFewRows;
}

template <typename In>
tpf_status launch_16_bits(ProjectionArgs& args, const Device& device, int blocks, const tpf_projection& projection,
                          tpf_stream stream) {
  // Of tiles of 256 x 144 beside peers cost_of promises too much: up to 1.1 of the others' time (docs/performance.md).
  if (args.team.world_size == 1) {
    return launch_cheapest<WideTiles<In>, LargeTiles<In>, LargeNarrowTiles<In>, HalfLargeTiles<In>, MediumTiles<In>,
                           MediumNarrowTiles<In>, SmallTiles<In>, FewRows<In>, FewRowsManyBlocks<In>>(
        args, device, blocks, projection, stream);
  }
  return launch_cheapest<WideTiles<In>, LargeTiles<In>, HalfLargeTiles<In>, MediumTiles<In>, MediumNarrowTiles<In>,
                         SmallTiles<In>, FewRows<In>, FewRowsManyBlocks<In>>(args, device, blocks, projection, stream);
}

}  // namespace
}  // namespace tpf

tpf_status tpf_qkv_a_proj_ag_cuda(void* const outputs[3], const tpf_projection* projection, const tpf_team* team,
                                  const tpf_call* call, tpf_stream stream) {
  using namespace tpf;
  Device device;
  if (const tpf_status status = use_device(&device, team->device); status != TPF_OK) return status;
  const tpf_dtype dtype = static_cast<tpf_dtype>(call->dtype);
  const int64_t element_bytes = bytes_of(dtype), hidden = call->hidden_size, columns = call->columns;
  ProjectionArgs args = {};
  args.partition = partition_of(call->num_tokens, team->world_size);
  if (!device.is_hopper || dtype == TPF_F32 || hidden * element_bytes % 16 != 0 || columns % 8 != 0 ||
      encoder() == nullptr || !begins_at_16_bytes(projection->input) || !begins_at_16_bytes(projection->weight)) {
    return TPF_UNSUPPORTED;
  }
  const bool norm = call->op == TPF_QKV_A_PROJ_AG_NORM;
  if (norm && (projection->q_columns > NormedPart<__half, kQVectors>::kMaxColumns ||
               projection->kv_columns > NormedPart<__half, kKvVectors>::kMaxColumns)) {
    return TPF_UNSUPPORTED;
  }
  const uint32_t rest = call->columns - (norm ? projection->q_columns + projection->kv_columns : 0);
  const uint32_t pieces[3] = {norm ? static_cast<uint32_t>(projection->q_columns) : rest,
                              norm ? static_cast<uint32_t>(projection->kv_columns) : 0, norm ? rest : 0};
  for (int i = 0; i < 3; ++i) {
    if (pieces[i] % 8 != 0 || !begins_at_16_bytes(outputs[i])) return TPF_UNSUPPORTED;
    args.outputs[i] = static_cast<char*>(outputs[i]);
    args.columns[i] = pieces[i];
  }
  args.scale = projection->scale;
  args.scale_row_stride = projection->scale_row_stride;
  args.scale_group_stride = projection->scale_group_stride;
  args.weight_scale = projection->weight_scale;
  args.bias = projection->bias;
  args.norm_weights[0] = projection->q_a_weight;
  args.norm_weights[1] = projection->kv_a_weight;
  args.eps = projection->eps;
  args.team = *team;
  args.call = *call;
  args.call.variant |= TPF_FUSED;
  args.contract = contract_of(args.call);
  args.k_blocks = static_cast<int32_t>((hidden * element_bytes + kSwizzleBytes - 1) / kSwizzleBytes);
  args.fours_of_scales = args.k_blocks % 4 == 0 && args.scale_group_stride == 1 && args.scale_row_stride % 4 == 0 &&
                         begins_at_16_bytes(args.scale) && begins_at_16_bytes(args.weight_scale);
  // As many blocks as there may be, even where they have no tile: they copy. All must be on the card at once, since
  // each waits for what the others multiply.
  int blocks = std::min(most_blocks(team->max_ctas), device.processors);
  if (blocks > 16) blocks -= blocks % 2;  // so many are better off in pairs
  if (product_comes_first(args, blocks)) {
    if (tpf_plan* plan = plan_instead()) plan->few_rows = 1;
    return TPF_UNSUPPORTED;
  }
  switch (dtype) {
    case TPF_BF16:
      return launch_16_bits<__nv_bfloat16>(args, device, blocks, *projection, stream);
    case TPF_F16:
      return launch_16_bits<__half>(args, device, blocks, *projection, stream);
    default:
      return launch_cheapest<WideTiles<__nv_fp8_e4m3>, MediumTiles<__nv_fp8_e4m3>, NarrowTiles<__nv_fp8_e4m3>>(
          args, device, blocks, *projection, stream);
  }
}
