// Constants that were fitted to measured times: all of them, and nothing else, each with card, command and commit. The
// rest of a plan is counted. By architecture, but for kLinkCost. All ranks take the same ones: init refuses cards of
// different architectures. `compare_builds` is tools/compare_builds.py.
#pragma once
#include <cstdint>

namespace tpf {

struct Fitted {
  // A grid of more blocks has a card to itself. Half of H100's SMs, whatever this card has: cards may differ. Not
  // fitted; what follows from it was: two H100, `python -m bench multi --launches blocks`, at 5db5881.
  int half_a_card;

  // ---- reductions ----
  // Bytes of a block's ring of row buffers, where these are enough for a row of every source. More bytes in flight do
  // not help, and with half of the card's SMs a loss: 932 us instead of 862 with 8 blocks a rank, 16384 tokens and 16
  // rows. One H100, 8 ranks, `compare_builds`, at 1c2a263.
  int64_t ring_bytes;
  // Blocks that share a row, from which on it is posted into the inboxes rather than read in place, where ranks share a
  // card: one H100, 8 ranks, `compare_builds`, at b38635b. On a card of its own all are: 64, 128 and 256 tokens took
  // 6.6, 8.4 and 12.6 us read in place, 6.6, 8.1 and 10.2 us posted. Two H200, `compare_builds`, in runs of their own,
  // at 35b935c.
  int cluster_to_post;
  // Bytes that a rank adds up in rs_rmsnorm_ag, up to which it is faster for all ranks to add up all rows, in one
  // synchronisation instead of two: where ranks share a card, 8 / 16 / 32 tokens of DeepSeek-V3 of 8 / 4 / 2 ranks. One
  // H200, `compare_builds`, at 0be5b49. On a card of its own 8 tokens of two ranks, not 16. Two H200, `compare_builds`,
  // at c738612.
  int64_t shared_card_all_rows, own_card_all_rows;
  // The same for rs_rmsnorm_ag_fp8, in bytes that a rank posts. More than in 16 bits, since the other way takes one
  // more kernel, to quantise. Two ranks with a card each: 128 tokens, not 256. On a shared card: 128 of two ranks, 32
  // and not 64 of four, 16 and not 32 of eight. Two H200, `python -m bench rs_rmsnorm_ag_fp8` with either way forced,
  // at 8dd519d.
  int64_t quantized_all_rows;
  // Bytes that all ranks of a shared card post to each other, up to which normalised rows are posted to be gathered
  // rather than fetched: 32 tokens of 8 ranks, not 64; all that are one row a block of 2 and 4 ranks. One H200,
  // `compare_builds`, of 8 ranks at 35b935c, of 2 and 4 at c738612.
  int64_t shared_card_posted;
  // Rows of a block, up to which all are posted on a card of its own, instead of moved by TMA in chunks: 512 tokens of
  // two ranks, not 1024. Two H200, `compare_builds`, at 35b935c.
  int own_card_posted_rows;
  // Rows of a chunk that is gathered from a card of its own, at least. Two H100, `compare_builds`, at f3ee214.
  int gathered_rows_of_chunk;

  // ---- all-gathers ----
  // Bytes of a rank's chunk, at least: eight rows of DeepSeek-V3's latent. Two H100, `compare_builds`, at
  // 3d36517.
  int gather_chunk_bytes;

  // ---- projections ----
  // Rows of a rank, up to which cuBLAS and then a gather take less time than one kernel, where a rank has a card to
  // itself: all tiles are multiplied at once, no row is finished early enough for its way to be hidden, and cuBLAS can
  // divide K, too. Two H100, 2112 columns, `python -m bench multi`, at de2d5c8.
  int few_rows;
  // Rows that all ranks have, up to which one kernel multiplies and posts columns: of more, each of its blocks reads
  // more of the rows than of the weight, and cuBLAS and then a gather take less time. Where ranks share a card: one
  // H200, `compare_builds`, at ae897c8. On a card of its own, times this rank's columns: of 1056, 8 rows and not 64.
  // Two H200, `compare_builds`, at 35b935c.
  int shared_card_column_rows, own_card_column_products;
  // The second one for fp8, of which Triton multiplies more rows, one K block after the other: of 1152 columns, 32 rows
  // and not 64. Two H200, `python -m bench mla_prologue_fp8` with either way forced, at 8dd519d.
  int own_card_fp8_column_products;
  // What a pass over columns costs there besides, and each block of a cluster, in K blocks of a row.
  // Two H200, clusters of one, four and eight forced, `compare_builds`, at 35b935c.
  int column_pass, column_cluster;
  // For the time of a tile, in cycles a block of K: products of so many rows times columns a cycle; of fp8, cycles that
  // each product is waited for; bytes of operands a cycle, of fp8, of 16 bits on a shared card, and on a rank's own.
  // Fitted as kFittedSm90 says, and so are those below.
  int products_a_cycle, fp8_wait, fp8_operands, shared_card_operands, own_card_operands;
  // For the time of copying, bytes a cycle: of a block, and of all, which are bound by the card's links or its memory.
  int block_copies, card_copies;
  // Percent of copying that waits behind the products of fp8, although its rows are complete before the last wave.
  int fp8_copies_seen;
};

// One H100, 64 to 16384 tokens, each kind of tile forced: of a rank alone, of four and eight that share the card
// (`python -m bench goals`), and of two with a card each (`python -m bench multi`), at 5db5881; 128 x 264 tiles of 16
// bits came later, and take what this says where ranks share a card. fp8's anew, alone and on two H200, at 30e9e0d.
constexpr Fitted kFittedSm90 = {
    .half_a_card = 66,
    .ring_bytes = 128 << 10,
    .cluster_to_post = 4,
    .shared_card_all_rows = 896 << 10,
    .own_card_all_rows = 320 << 10,
    .quantized_all_rows = 1792 << 10,
    .shared_card_posted = 32 << 20,
    .own_card_posted_rows = 2,
    .gathered_rows_of_chunk = 8,
    .gather_chunk_bytes = 34 << 10,
    .few_rows = 256,
    .shared_card_column_rows = 32,
    .own_card_column_products = 16 * 1056,
    .own_card_fp8_column_products = 32 * 1152,
    .column_pass = 560,
    .column_cluster = 19,
    .products_a_cycle = 32,
    .fp8_wait = 260,
    .fp8_operands = 35,
    .shared_card_operands = 49,
    .own_card_operands = 60,
    .block_copies = 12,
    .card_copies = 250,
    .fp8_copies_seen = 23,
};

// mla_prologue, which goes the same way on all cards and backends (prologue.h): a byte from a peer takes as long as so
// many bytes of a rank's own memory. Both ways of 2112 columns, 1 to 1024 tokens, in one run each: gathered took less
// time up to 128 tokens, and more from 192 on, on two H200; up to 128 and not 256 where four ranks share one; up to 128
// in fp8 and 256 in bf16 where eight do (docs/notes/prologue_ways.md). `python -m bench mla_prologue --baselines
// chain,all-rows`, at cdb0ca1. One rule serves bf16 and fp8.
constexpr int64_t kLinkCost = 14;

// Not measured on such cards yet: sm_90's.
constexpr Fitted kFittedSm80 = kFittedSm90;
constexpr Fitted kFittedSm100 = kFittedSm90;

}  // namespace tpf
