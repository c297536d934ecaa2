// The kernels of csrc/cuda as the ops call them: on raw device pointers, queued on a stream. No torch.
//
// Nothing here waits for the device, allocates, or depends on values in device memory, so a call can be captured in a
// CUDA graph. Indices, pages, ranges and lengths are not checked, since that would mean waiting: entries out of range
// are skipped, and nothing outside the tensors is read or written.

#pragma once

#include <cstdint>

#include "kernels.h"

struct CUstream_st;

namespace trimserve::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Floats of workspace that one call of headwise_scores needs.
std::int64_t headwise_scores_workspace(const HeadwiseScoresArgs& args);

// Ranges of visibility are cut to [0, N].
void headwise_scores(const HeadwiseScoresArgs& args, float* workspace, Stream stream);

// args.segments: on the host. num_heads: H.
void headwise_topk(const HeadwiseTopkArgs& args, std::int64_t num_heads, Stream stream);

// Words of a bitmap of features.
inline std::int64_t num_words(std::int64_t num_features) { return (num_features + 31) / 32; }

// args.segments: on the host; args.is_kept: not used. Sets the bits of the features that a head picks, clears the
// others; bitmap [num_words(N)].
void mark_kept(const SelectFeaturesArgs& args, std::uint32_t* bitmap, Stream stream);

// Sets the bits of the features that are among picks, clears the others. A pick outside [0, num_features) is left out.
void mark_picks(const std::int64_t* picks, std::int64_t num_picks, std::int64_t num_features,
                std::uint32_t* bitmap, Stream stream);

// The features whose bit is set, at most `size`, ascending, to kept [size], whose tail becomes -1; their number to
// num_kept.
void list_kept(const std::uint32_t* bitmap, std::int64_t num_features, std::int64_t* kept, std::int64_t size,
               std::int64_t* num_kept, Stream stream);

// What indices of write_kv may name.
struct KvBounds {
  std::int64_t num_rows;   // of keys and values
  std::int64_t num_slots;  // of the pages
};

// num_slots: of args.slots, and of args.kept where there is one. Where either index is out of bounds nothing is stored.
void write_kv(const WriteKvArgs& args, std::int64_t num_slots, const KvBounds& bounds, Stream stream);

// Floats of workspace that one call of paged_attention needs: 0 where no sequence has several pieces.
std::int64_t paged_attention_workspace(const PagedAttentionArgs& args, std::int64_t max_pages);

// max_pages: columns of args.tables. Lengths are cut to what they hold; pages outside [0, num_pages) weigh nothing.
void paged_attention(const PagedAttentionArgs& args, std::int64_t max_pages, std::int64_t num_pages,
                     float* workspace, Stream stream);

// num_rows: R.
void silu_gate(const SiluGateArgs& args, std::int64_t num_rows, Stream stream);
void rotate(const RotateArgs& args, std::int64_t num_rows, Stream stream);

// args.heads: queries, then keys, both rotated, then values, which are not counted in args.num_heads. Keys and values
// also go to their pages, as write_kv does it; of `store` what says where from is not read.
void rotate_write_kv(const RotateArgs& args, const WriteKvArgs& store, std::int64_t num_rows,
                     std::int64_t num_slots, Stream stream);

}  // namespace trimserve::cuda
