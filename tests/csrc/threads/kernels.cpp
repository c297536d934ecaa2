// Runs every kernel of csrc/cuda on small inputs, with the threads of a block as threads. What they compute is tested
// elsewhere; here only that ThreadSanitizer finds no race.

#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/launchers.h"
#include "cuda_runtime.h"

namespace {

using namespace trimserve;

std::mt19937 generator(0);

// Floats that are also valid bfloat16 and float16 by pairs, none of them large.
std::vector<float> random_floats(std::size_t count) {
  std::uniform_real_distribution<float> distribution(-1.0f, 1.0f);
  std::vector<float> values(count);
  for (float& value : values) value = distribution(generator);
  return values;
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16};

std::int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void run_scores() {
  constexpr std::int64_t kRows = 40, kFeatures = 150, kHeads = 4, kKvHeads = 2, kDim = 40;
  const std::vector<float> q = random_floats(kRows * kHeads * kDim),
                           k = random_floats(kFeatures * kKvHeads * kDim);
  std::vector<std::int32_t> visibility;
  for (std::int32_t row = 0; row < kRows; ++row)
    visibility.insert(visibility.end(), {row, std::int32_t{kFeatures} - row});
  std::vector<float> scores(kHeads * kFeatures);
  for (const DType dtype : kDTypes) {
    HeadwiseScoresArgs args{};
    args.q = q.data();
    args.k = k.data();
    args.visibility = visibility.data();
    args.scores = scores.data();
    args.dtype = dtype;
    args.num_rows = kRows;
    args.num_features = kFeatures;
    args.num_heads = kHeads;
    args.num_kv_heads = kKvHeads;
    args.head_dim = kDim;
    args.q_stride = kHeads * kDim;
    args.k_stride = kKvHeads * kDim;
    args.scale = 0.3f;
    std::vector<float> workspace(cuda::headwise_scores_workspace(args));
    cuda::headwise_scores(args, workspace.data(), nullptr);
  }
}

void run_selection() {
  constexpr std::int64_t kHeads = 2, kFeatures = 1500, kPicks = 300;
  std::vector<float> scores = random_floats(kHeads * kFeatures);
  for (float& score : scores) score = static_cast<float>(static_cast<int>(score * 20.0f));  // many ties
  const std::vector<Segment> segments{{.begin = 0, .size = 1100, .k = 200, .picks_begin = 0},
                                      {.begin = 1100, .size = 400, .k = 100, .picks_begin = 200}};
  std::vector<std::int64_t> picks(kHeads * kPicks);
  const HeadwiseTopkArgs topk{.scores = scores.data(),
                              .picks = picks.data(),
                              .segments = segments.data(),
                              .num_segments = 2,
                              .num_features = kFeatures,
                              .num_picks = kPicks};
  cuda::headwise_topk(topk, kHeads, nullptr);
  std::vector<std::uint32_t> bitmap(cuda::num_words(kFeatures));
  std::vector<std::int64_t> kept(2 * kPicks);
  std::int64_t num_kept = 0;
  cuda::mark_picks(picks.data(), kHeads * kPicks, kFeatures, bitmap.data(), nullptr);
  cuda::list_kept(bitmap.data(), kFeatures, kept.data(), kHeads * kPicks, &num_kept, nullptr);
  std::vector<Cut> cuts(kHeads * segments.size());
  const SelectFeaturesArgs select{.scores = scores.data(),
                                  .cuts = cuts.data(),
                                  .is_kept = nullptr,
                                  .segments = segments.data(),
                                  .num_segments = 2,
                                  .num_heads = kHeads,
                                  .num_features = kFeatures};
  cuda::mark_kept(select, bitmap.data(), nullptr);
  cuda::list_kept(bitmap.data(), kFeatures, kept.data(), kHeads * kPicks, &num_kept, nullptr);
}

// Pages of two layers, the second of which is used.
struct Pool {
  static constexpr std::int64_t kPages = 40, kKvHeads = 2, kDim = 40;
  std::vector<float> memory = random_floats(kPages * 2 * 2 * kKvHeads * kPagePositions * kDim);

  std::byte* layer(DType dtype) {
    return reinterpret_cast<std::byte*>(memory.data()) + page_stride() / 2 * bytes_of(dtype);
  }
  static constexpr std::int64_t page_stride() { return 2 * 2 * kKvHeads * kPagePositions * kDim; }
};

void run_attention(Pool& pool) {
  constexpr std::int64_t kMaxPages = 36;
  const std::vector<std::int32_t> lengths{0, 1, 300, 517, 256};
  const auto num_sequences = static_cast<std::int64_t>(lengths.size());
  std::vector<std::int32_t> tables(num_sequences * kMaxPages);
  for (std::size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<std::int32_t>(i * 7 % Pool::kPages);
  for (const DType dtype : kDTypes) {
    for (const std::int64_t group : {1, 3}) {  // query heads of a KV head
      for (const std::int64_t max_pages : {kMaxPages, std::int64_t{3}}) {
        const std::int64_t heads = group * Pool::kKvHeads;
        const std::vector<float> q = random_floats(num_sequences * heads * Pool::kDim);
        std::vector<float> attended(q.size());
        const std::vector<float> bias = random_floats(num_sequences * max_pages * kPagePositions);
        const PagedAttentionArgs args{.q = q.data(),
                                      .pages = pool.layer(dtype),
                                      .tables = tables.data(),
                                      .lengths = lengths.data(),
                                      .bias = bias.data(),
                                      .attended = attended.data(),
                                      .dtype = dtype,
                                      .is_int8 = false,
                                      .num_sequences = num_sequences,
                                      .num_heads = heads,
                                      .num_kv_heads = Pool::kKvHeads,
                                      .head_dim = Pool::kDim,
                                      .q_stride = heads * Pool::kDim,
                                      .table_stride = kMaxPages,
                                      .page_stride = Pool::page_stride(),
                                      .bias_stride = max_pages * kPagePositions,
                                      .scale = 0.3f};
        std::vector<float> workspace(cuda::paged_attention_workspace(args, max_pages));
        cuda::paged_attention(args, max_pages, Pool::kPages, workspace.data(), nullptr);
      }
    }
  }
}

void run_rows(Pool& pool) {
  constexpr std::int64_t kRows = 5, kHeads = 3 + 2 * Pool::kKvHeads;
  std::vector<float> heads = random_floats(kRows * kHeads * Pool::kDim);
  const std::vector<float> cosines = random_floats(kRows * Pool::kDim / 2), sines = cosines;
  const std::vector<std::int64_t> slots{3, 100, 17, 16, 5}, kept{4, 0, 1, 3, 2};
  for (const DType dtype : kDTypes) {
    const std::int64_t head_bytes = Pool::kDim * bytes_of(dtype);
    const auto* const rows = reinterpret_cast<const std::byte*>(heads.data());
    const WriteKvArgs store{.keys = {rows, kHeads * head_bytes, head_bytes},
                            .values = {rows, kHeads * head_bytes, head_bytes},
                            .pages = pool.layer(dtype),
                            .kept = kept.data(),
                            .slots = slots.data(),
                            .num_kv_heads = Pool::kKvHeads,
                            .head_bytes = head_bytes,
                            .page_stride_bytes = Pool::page_stride() * bytes_of(dtype),
                            .head_dim = Pool::kDim,
                            .dtype = dtype,
                            .is_int8 = false,
                            .is_streamed = false};
    cuda::write_kv(store, kRows, {kRows, Pool::kPages * kPagePositions}, nullptr);
    const RotateArgs rotation{.heads = heads.data(),
                              .cosines = cosines.data(),
                              .sines = sines.data(),
                              .dtype = dtype,
                              .num_heads = kHeads - Pool::kKvHeads,
                              .head_dim = Pool::kDim,
                              .row_stride = kHeads * Pool::kDim};
    cuda::rotate(rotation, kRows, nullptr);
    cuda::rotate_write_kv(rotation, store, kRows, Pool::kPages * kPagePositions, nullptr);
    const std::vector<std::int32_t> counts{0, 1, 2, 0, 3};
    std::vector<float> gated(kRows * 20);
    const SiluGateArgs gate{.gate_up = heads.data(),
                            .counts = counts.data(),
                            .output = gated.data(),
                            .dtype = dtype,
                            .size = 20,
                            .row_stride = 40};
    cuda::silu_gate(gate, kRows, nullptr);
  }
}

}  // namespace

int main() {
  run_scores();
  run_selection();
  Pool pool;
  run_attention(pool);
  run_rows(pool);
  std::printf("%llu kernels\n", static_cast<unsigned long long>(fibers::num_launches));
}
