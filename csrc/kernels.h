// Arguments of all kernels, and signatures of the CPU kernels (those for CUDA: cuda/launchers.h). Raw pointers and
// counts, no torch. The ops have checked and allocated everything.
//
// A CPU kernel works on the half-open range [begin, end) of the dimension named here, so that an op can hand ranges to
// torch's thread pool; ranges write disjoint memory. Strides count elements between rows unless their name says bytes;
// a row itself is contiguous unless it has a stride of its own. Dimensions: T text rows, N visual features, H query
// heads, Hkv key/value heads, Dh head size, K picks of one head, M kept features, B sequences, P pages, G layers of a
// page. In layers outside attention: R rows, K inputs, N outputs.

#pragma once

#include <cstddef>
#include <cstdint>

#include "ordered_key.h"

namespace trimserve {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// q [T, H, Dh] and k [N, Hkv, Dh] of `dtype`; visibility [T, 2]; scores [H, N].
struct HeadwiseScoresArgs {
  const void* q;
  const void* k;
  const std::int32_t* visibility;
  const float* log_sums;  // of attention [H, T], or null
  float* scores;
  DType dtype;
  std::int64_t num_rows;      // T
  std::int64_t num_features;  // N
  std::int64_t num_heads;     // H
  std::int64_t num_kv_heads;  // Hkv
  std::int64_t head_dim;      // Dh
  std::int64_t q_stride;
  std::int64_t k_stride;
  float scale;
};

// q and attended [T, H, Dh], k and v [N, Hkv, Dh] of `dtype`; visibility [T, 2]; bias [N]; log_sums [H, T].
struct AttentionArgs {
  const void* q;
  const void* k;
  const void* v;
  const std::int32_t* visibility;
  const float* bias;  // or null
  void* attended;
  float* log_sums;
  DType dtype;
  std::int64_t num_rows;      // T
  std::int64_t num_keys;      // N
  std::int64_t num_heads;     // H
  std::int64_t num_kv_heads;  // Hkv
  std::int64_t head_dim;      // Dh
  std::int64_t q_stride;
  std::int64_t k_stride;
  std::int64_t v_stride;
  float scale;
};

// One image's features: `size` of them from `begin` on. A head picks `k` of them, which start at `picks_begin` in its
// row of picks.
struct Segment {
  std::int64_t begin;
  std::int64_t size;
  std::int64_t k;
  std::int64_t picks_begin;
};

// scores [H, N]; picks [H, K].
struct HeadwiseTopkArgs {
  const float* scores;
  std::int64_t* picks;
  const Segment* segments;
  std::int64_t num_segments;
  std::int64_t num_features;  // N
  std::int64_t num_picks;     // K
};

// scores [H, N]; cuts [H, segments]; is_kept [N], 0 or 1.
struct SelectFeaturesArgs {
  const float* scores;
  Cut* cuts;
  std::uint8_t* is_kept;
  const Segment* segments;
  std::int64_t num_segments;
  std::int64_t num_heads;     // H
  std::int64_t num_features;  // N
};

// Keys and values live in pages [P, G, 2, Hkv, kPagePositions, Dh]: a page holds kPagePositions positions of G layers;
// 2 stands for keys, values. A sequence's table lists its pages. Pages of int8 have Dh + kScaleBytes to each
// row of a head: the integers of its kPagePositions positions, then as many float16 that multiply them.
constexpr std::int64_t kPagePositions = 16;
constexpr std::int64_t kScaleBytes = 2;

// Rows [N, Hkv, Dh], each head contiguous.
struct KvRows {
  const std::byte* data;
  std::int64_t row_stride_bytes;
  std::int64_t head_stride_bytes;
};

// keys and values of `dtype`. Row kept[r] goes to page slots[r] / kPagePositions, offset slots[r] % kPagePositions.
struct WriteKvArgs {
  KvRows keys;
  KvRows values;
  std::byte* pages;          // of one layer: its slot in the first page
  const std::int64_t* kept;  // null for r itself
  const std::int64_t* slots;
  std::int64_t num_kv_heads;  // Hkv
  std::int64_t head_bytes;    // of one position in a page
  std::int64_t page_stride_bytes;
  std::int64_t head_dim;  // Dh
  DType dtype;            // of keys and values
  bool is_int8;           // pages are
  bool is_streamed;  // bypasses the caches; pages and head_bytes must then be multiples of kStreamedBytes
};

constexpr std::int64_t kStreamedBytes = 16;

// q and attended [B, H, Dh] of `dtype`; tables [B, max_pages]; lengths [B]; bias [B, max_pages * kPagePositions].
struct PagedAttentionArgs {
  const void* q;
  const void* pages;  // of one layer: its slot in the first page
  const std::int32_t* tables;
  const std::int32_t* lengths;
  const float* bias;  // or null
  void* attended;
  DType dtype;                 // of q, and of pages if they are not int8
  bool is_int8;                // pages are
  std::int64_t num_sequences;  // B
  std::int64_t num_heads;      // H
  std::int64_t num_kv_heads;   // Hkv
  std::int64_t head_dim;       // Dh
  std::int64_t q_stride;
  std::int64_t table_stride;
  std::int64_t page_stride;
  std::int64_t bias_stride;
  float scale;
};

// How linear's weight is stored: as `dtype`; or as int8, whose scales are float32 [N]; or as int4 (trimserve.ops.
// reference.unpack_int4 defines it), whose scales are of scale_dtype [N, ceil(K / group)].
enum class WeightFormat { kFloats, kInt8, kInt4 };

// x [R, K]; weight [N, K]; output [R, N] = gate * x weight^T, added to the old output if `accumulates`; x and output of
// `dtype`.
struct LinearArgs {
  const void* x;
  const void* weight;
  const void* scales;  // or null
  void* output;
  DType dtype;
  WeightFormat format;
  DType scale_dtype;
  std::int64_t group;  // of inputs, a multiple of kInt4Unit
  bool accumulates;
  float gate;
  std::int64_t num_rows;     // R
  std::int64_t num_outputs;  // N
  std::int64_t num_inputs;   // K
  std::int64_t x_stride;
};
constexpr std::int64_t kInt4Unit = 32, kInt4UnitBytes = 16;  // inputs whose halves of bytes lie together
constexpr std::int64_t kLinearColumns = 16;                  // outputs of a block
constexpr std::int64_t kLinearRows = 256;                    // at most, of one call

// x and output [R, H, K], weight [K], all of `dtype`.
struct RmsNormArgs {
  const void* x;
  const void* weight;
  void* output;
  DType dtype;
  std::int64_t num_heads;  // H
  std::int64_t size;       // K
  std::int64_t x_stride;
  float epsilon;
};

// gate_up [R, 2 I], output [R, I], of `dtype`; counts [R].
struct SiluGateArgs {
  const void* gate_up;
  const std::int32_t* counts;  // or null
  void* output;
  DType dtype;
  std::int64_t size;  // I
  std::int64_t row_stride;
};

// heads [R, H, Dh] of `dtype`; cosines and sines [R, Dh / 2].
struct RotateArgs {
  void* heads;
  const float* cosines;
  const float* sines;
  DType dtype;
  std::int64_t num_heads;  // H
  std::int64_t head_dim;   // Dh
  std::int64_t row_stride;
};

namespace cpu {

// Floats of workspace that one call of headwise_scores needs.
std::int64_t headwise_scores_workspace(const HeadwiseScoresArgs& args);

// Range over heads.
void headwise_scores(const HeadwiseScoresArgs& args, std::int64_t begin, std::int64_t end, float* workspace);

// Range and memory of one call of attention.
struct AttentionSizes {
  std::int64_t num_blocks;  // its range: blocks of rows of each KV head
  std::int64_t workspace;   // floats of each range
};
AttentionSizes attention_sizes(const AttentionArgs& args);

// Range over blocks.
void attention(const AttentionArgs& args, std::int64_t begin, std::int64_t end, float* workspace);

// Range over heads. workspace: one key for each feature of the longest segment.
void headwise_topk(const HeadwiseTopkArgs& args, std::int64_t begin, std::int64_t end,
                   std::uint32_t* workspace);

// Range over heads. workspace: as headwise_topk.
void make_cuts(const SelectFeaturesArgs& args, std::int64_t begin, std::int64_t end,
               std::uint32_t* workspace);

// Range over features; after all ranges of make_cuts.
void mark_kept(const SelectFeaturesArgs& args, std::int64_t begin, std::int64_t end);

// Serial. is_kept[n] becomes 1 for every n in [0, num_features) that is among picks, else 0.
void mark_picks(const std::int64_t* picks, std::int64_t num_picks, std::int64_t num_features,
                std::uint8_t* is_kept);

// Serial. Lists the features whose mark is 1, at most `size`, ascending; the tail of kept is -1. Returns how many.
std::int64_t list_kept(const std::uint8_t* is_kept, std::int64_t num_features, std::int64_t* kept,
                       std::int64_t size);

// Range over slots.
void write_kv(const WriteKvArgs& args, std::int64_t begin, std::int64_t end);

// Range and memory of one call of paged_attention.
struct PagedAttentionSizes {
  std::int64_t num_pages;  // its range: pages to read, counted once for each KV head
  std::int64_t partials;   // floats, shared by all ranges
  std::int64_t workspace;  // floats of each range
};
PagedAttentionSizes paged_attention_sizes(const PagedAttentionArgs& args);

// Range over pages. Leaves sequences of several pieces to merge_pieces.
void paged_attention(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end, float* partials,
                     float* workspace);

// Range over the heads of all sequences, B * H; after all ranges of paged_attention.
void merge_pieces(const PagedAttentionArgs& args, std::int64_t begin, std::int64_t end, float* partials);

// Floats of the buffer that linear wants its rows packed into; 0 if it reads them as they are.
std::int64_t packed_size(const LinearArgs& args);

// Serial.
void pack_rows(const LinearArgs& args, float* packed);

// Range over blocks of kLinearColumns outputs; 1 to kLinearRows rows. packed: filled by pack_rows, or null.
void linear(const LinearArgs& args, const float* packed, std::int64_t begin, std::int64_t end);

// Range over rows.
void rms_norm(const RmsNormArgs& args, std::int64_t begin, std::int64_t end);

// Range over rows.
void silu_gate(const SiluGateArgs& args, std::int64_t begin, std::int64_t end);

// Range over rows.
void rotate(const RotateArgs& args, std::int64_t begin, std::int64_t end);

}  // namespace cpu
}  // namespace trimserve
