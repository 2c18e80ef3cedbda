// The tiles that qkv_a_proj_ag_kernel multiplies: what follows from their size, and the shared memory of a block.
#pragma once
#include <bit>
#include <numeric>

#include "card.h"

namespace tpf {

constexpr int kSwizzleBytes = 128;                 // of K, in a row of an operand
constexpr int kProductWarps = 8, kOtherWarps = 4;  // of a block, the others before them
constexpr int kProjectionThreads = 32 * (kProductWarps + kOtherWarps);
constexpr int kCopiers = 2;                   // of the other warps
constexpr int kQVectors = 8, kKvVectors = 3;  // of a lane, in the two normed parts of a row
constexpr int kNormVectors = kQVectors + kKvVectors;
constexpr int kNormBufferBytes = 2 * kNormVectors * 32 * kVectorBytes;  // of a warp that norms beside fp8 products
constexpr int kGrouped = 4;  // row blocks whose tiles are neighbours in the order: they share operands in the L2

// How many of a thread's accumulators the first product has. A product has 256 columns at most, which are 128
// accumulators: more are two products, the larger one last. Two are faster than three, each of which reads the rows
// from shared memory again.
constexpr int first_product(int accumulators) { return accumulators <= 128 ? accumulators : accumulators / 8 * 4; }

// Of rows of so many 16-bit elements in shared memory: an odd number of vectors of 16 bytes, for eight rows of them to
// lie in different banks.
constexpr int staged_pitch(int columns) { return (columns / 8 | 1) * 8; }

// How many columns find room for 16 rows.
constexpr int most_staged(int bytes) {
  int columns = 8;
  while (staged_pitch(columns + 8) * 32 <= bytes) columns += 8;
  return columns;
}

// Columns in as few parts as there can be of at most so many, alike and of whole patterns of 8.
constexpr int divided(int columns, int most) {
  int parts = 1;
  while (columns % (8 * parts) != 0 || columns / parts > most) ++parts;
  return columns / parts;
}

// A block's tile, and its two warp groups' shares of it: half of the rows each or, where rows are few, half of the
// columns. Column counts in use are multiples of 64 and not of 128.
template <int kElementBytes, int kTileRows, int kTileColumns, int kTileStages>
struct TileShape {
  static constexpr int kRows = kTileRows, kColumns = kTileColumns, kStages = kTileStages;
  static constexpr bool kByRows = kRows >= 128;
  static constexpr int kGroupRows = kByRows ? kRows / 2 : kRows;
  static constexpr int kGroupColumns = kByRows ? kColumns : kColumns / 2;
  static constexpr int kMTiles = kGroupRows / 64;          // a product has 64 rows
  static constexpr int kAccumulators = kGroupColumns / 2;  // that a thread holds of a part
  static constexpr int kStageBytes = (kRows + kColumns) * kSwizzleBytes;
  static constexpr bool kScaled = kElementBytes == 1;
  // Where columns have scales, 128 have one, and no tile's are more than 256 that follow one another: what a tile has
  // beyond that lies behind all tiles' runs. So 264 columns have three scales, whichever tile it is.
  static constexpr int kMainColumns = kScaled ? std::min(kColumns, 256) : kColumns, kTail = kColumns - kMainColumns;
  static_assert(kTail == 0 || (kByRows && 128 % std::max(kTail, 1) == 0));  // so that the tail ones have one scale
  static constexpr int kWeightBox =
      divided(kMainColumns, 256);  // rows of the weight that are fetched at once: at most so many
  // Whether one warp group promotes while the other multiplies. It costs the way from one to the other each time, which
  // is little where the products themselves wait longest for their beginning and their end.
  static constexpr bool kPingPong = kScaled && kColumns <= 64;
  // Scales, each for 128 of K: of the tile's rows, and of its columns. A tile may begin among 128 columns that have the
  // same: these are columns that surely have.
  static constexpr int kScaledColumns = std::gcd(kMainColumns, 128);
  static constexpr int kColumnScales = (kColumns + kScaledColumns - 1) / kScaledColumns;
  // Those of four blocks of K lie together. When the first of the four is fetched, all but kStages - 1 blocks of K
  // before it have been multiplied: so many fours are kept that those stages' scales are not overwritten.
  static constexpr int kScaleQuads = (kStages + 3 + 3) / 4;
  static constexpr int kScales = kScaled ? kScaleQuads * 4 * (kRows + kColumnScales) : 0;
  // A finished tile leaves through the stage that was multiplied last, of which each warp has a share: 16 rows at a
  // time of so many columns.
  static constexpr int kStagedBytes = kStageBytes / kProductWarps;
  static constexpr int kStagedColumns = divided(std::min(kGroupColumns, kMainColumns), most_staged(kStagedBytes));
  static_assert(kStagedBytes % 16 == 0);
};
enum class TileKind {
  // Many rows. The larger a tile, the fewer operands are read; the largest one's accumulators just find room in
  // registers. The
  // wide one reads more and has a stage more of it in flight, at the copying warps' expense: it takes as little time,
  // and less where it needs fewer waves. fp8 accumulators are held twice until they are promoted: of a wide tile a
  // product at a
  // time.
  kLarge,
  kLargeNarrow,
  kWide,
  kHalfLarge,
  kMedium,
  kMediumNarrow,
  kSmall,
  // Few rows of fp8: as many tiles as there are blocks on a card.
  kNarrow,
  // Few rows: the weight has to come from memory, through as many blocks as there are, with enough of it in flight.
  kFewRows,
  kFewRowsManyBlocks,
};

struct TileSize {
  int rows, columns, stages;
};

constexpr TileSize size_of(TileKind kind, int element_bytes) {
  switch (kind) {
    case TileKind::kLarge:
      return {256, 176, 3};
    case TileKind::kLargeNarrow:
      return {256, 144, 3};
    case TileKind::kWide:
      return {128, 264, element_bytes == 2 ? 4 : 3};
    case TileKind::kHalfLarge:
      return {128, 176, 4};
    case TileKind::kMedium:
      return {128, 192, 4};
    case TileKind::kMediumNarrow:
      return {128, 144, 4};
    case TileKind::kSmall:
      return {128, 96, 5};
    case TileKind::kNarrow:
      return {128, 64, 6};
    case TileKind::kFewRows:
      return {64, 144, 6};
    case TileKind::kFewRowsManyBlocks:
      return {64, 16, 14};
  }
  return {};
}

constexpr int kMaxProductStages = 14;

template <TileKind... kKinds>
struct TileKinds {};

// Which ones there are, by the bytes of an element; of the cheapest ones the first.
using TilesOf16Bits =
    TileKinds<TileKind::kWide, TileKind::kLarge, TileKind::kLargeNarrow, TileKind::kHalfLarge, TileKind::kMedium,
              TileKind::kMediumNarrow, TileKind::kSmall, TileKind::kFewRows, TileKind::kFewRowsManyBlocks>;
using TilesOfFp8 = TileKinds<TileKind::kWide, TileKind::kMedium, TileKind::kNarrow>;

template <int kElementBytes, TileKind kKind>
using TileShapeOf = TileShape<kElementBytes, size_of(kKind, kElementBytes).rows, size_of(kKind, kElementBytes).columns,
                              size_of(kKind, kElementBytes).stages>;

// A block's shared memory. What the operands leave, the copying warps share: more or larger buffers are no gain. Beside
// the three stages of wide fp8 tiles smaller ones are: an operand waits behind what is being copied.
template <typename Tiles, bool kNorm>
struct SharedBytes {
  static constexpr int kMost = 232448 - kStaticSharedBytes;  // sm_90
  static constexpr bool kNormsScaled = kNorm && Tiles::kScaled;
  static constexpr int kOperands = Tiles::kStages * Tiles::kStageBytes;
  static constexpr int kOthers = 1024  // for the stages to begin at a multiple of it, as the swizzle's pattern wants
                                 + kOperands + Tiles::kScales * 4 + (kNorm ? kNormVectors * 32 * kVectorBytes : 0) +
                                 (kNormsScaled ? kNormBufferBytes : 0);
  static_assert(!kNormsScaled || kProductWarps * kNormBufferBytes <= kOperands);  // where the warps that multiply norm
  static constexpr int kMostBuffers = kCopierStages, kMostBufferBytes = Tiles::kTail > 0 ? 6144 : 7168;
  static constexpr int kLeft = (kMost - kOthers) / kCopiers / 16 * 16;
  static constexpr int kCopierBytes = std::min(kMostBuffers * kMostBufferBytes, kLeft);
  static constexpr int kBuffers = kNormsScaled || kCopierBytes == kMostBuffers * kMostBufferBytes ? kMostBuffers : 2;
  static constexpr int kAll = kOthers + kCopiers * kCopierBytes;
  static constexpr int buffer_bytes(int buffers) { return kCopierBytes / buffers / 16 * 16; }
};

}  // namespace tpf
