// CPU ops of a layer outside attention: checks, allocation, threads. Kernels are in cpu/.

#include <algorithm>
#include <atomic>
#include <vector>

#include "op_args.h"
#include "op_checks.h"
#include "ops.h"

namespace trimserve {

namespace {

WeightFormat format_of(const Tensor& weight) {
  const ScalarType stored = weight.scalar_type();
  return stored == ScalarType::Char   ? WeightFormat::kInt8
         : stored == ScalarType::Byte ? WeightFormat::kInt4
                                      : WeightFormat::kFloats;
}

constexpr std::int64_t kMostShared = 15;            // rows that mostly wait for the weight (ADR-0023)
constexpr std::int64_t kBytesAtOnce = 1024 * 1024;  // of a weight that a thread takes, int4 counted as bytes

std::int64_t divide_up(std::int64_t size, std::int64_t part) { return (size + part - 1) / part; }

// Calls body for all blocks. Each thread passes a range of its own from begin to end, some blocks at a time, and then
// helps those that are behind: memory is not equally fast from every core at every moment (ADR-0023).
template <typename Body>
void share_out(std::int64_t num_blocks, std::int64_t blocks_per_thread, std::int64_t blocks_at_once,
               const Body& body) {
  struct alignas(64) Range {
    std::atomic<std::int64_t> next;
    std::int64_t end;
  };
  const std::int64_t most = torch::stable::get_num_threads();
  const std::int64_t num_threads =
      std::clamp<std::int64_t>(divide_up(num_blocks, blocks_per_thread), 1, most);
  if (num_threads == 1) return body(0, num_blocks);
  std::vector<Range> ranges(num_threads);
  for (std::int64_t i = 0; i < num_threads; ++i) {
    ranges[i].next = num_blocks * i / num_threads;
    ranges[i].end = num_blocks * (i + 1) / num_threads;
  }
  torch::stable::parallel_for(0, num_threads, 1, [&](std::int64_t first, std::int64_t) {
    for (std::int64_t i = 0; i < num_threads; ++i) {
      Range& range = ranges[(first + i) % num_threads];
      for (std::int64_t begin;
           (begin = range.next.fetch_add(blocks_at_once, std::memory_order_relaxed)) < range.end;)
        body(begin, std::min(begin + blocks_at_once, range.end));
    }
  });
}

// Some of the rows, at most kLinearRows.
void multiply_rows(LinearArgs args, std::int64_t first_row, std::int64_t num_rows) {
  const std::int64_t element_size = (args.dtype == DType::kFloat32 ? 4 : 2);
  args.x = static_cast<const std::byte*>(args.x) + first_row * args.x_stride * element_size;
  args.output = static_cast<std::byte*>(args.output) + first_row * args.num_outputs * element_size;
  args.num_rows = num_rows;
  const std::int64_t packed_size = cpu::packed_size(args);
  const auto packed = workspace<float>(packed_size);
  if (packed_size > 0) cpu::pack_rows(args, packed.get());
  // The more rows there are, the more work is in each byte of the weight, and the fewer bytes are worth a thread.
  const std::int64_t weight_bytes = args.format == WeightFormat::kFloats ? element_size : 1;
  const std::int64_t block_bytes = kLinearColumns * args.num_inputs * weight_bytes;
  const std::int64_t blocks_per_thread =
      kGrainBytes / (block_bytes * std::min<std::int64_t>(num_rows, 16) + 1) + 1;
  const std::int64_t num_blocks = divide_up(args.num_outputs, kLinearColumns);
  const auto multiply_blocks = [&](std::int64_t begin, std::int64_t end) {
    cpu::linear(args, packed_size > 0 ? packed.get() : nullptr, begin, end);
  };
  if (num_rows > kMostShared)
    return torch::stable::parallel_for(0, num_blocks, blocks_per_thread, multiply_blocks);
  share_out(num_blocks, blocks_per_thread, kBytesAtOnce / (block_bytes + 1) + 1, multiply_blocks);
}

// output = gate * x weight^T, or output += gate * x weight^T. Scales, if any, multiply the weight.
void multiply(const Tensor& output, const Tensor& x, const Tensor& weight, std::optional<Tensor> scales,
              double gate, bool accumulates) {
  if (scales) scales = torch::stable::contiguous(*scales);
  const Tensor rows = with_contiguous_rows(x);
  const WeightFormat format = format_of(weight);
  const LinearArgs args{
      .x = rows.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .scales = scales ? scales->const_data_ptr() : nullptr,
      .output = output.mutable_data_ptr(),
      .dtype = kernel_dtype(x.scalar_type()),
      .format = format,
      .scale_dtype = kernel_dtype(scales ? scales->scalar_type() : ScalarType::Float),
      .group = format == WeightFormat::kInt4 ? int4_group(x.size(1), scales->size(1)) : 0,
      .accumulates = accumulates,
      .gate = static_cast<float>(gate),
      .num_rows = x.size(0),
      .num_outputs = weight.size(0),
      .num_inputs = x.size(1),
      .x_stride = rows.stride(0),
  };
  if (args.num_rows == 0) return;
  // Turns of equal length, none of which has so few rows that another kernel would take them.
  const std::int64_t num_turns = divide_up(args.num_rows, kLinearRows);
  const std::int64_t rows_of_turn = divide_up(args.num_rows, num_turns);
  for (std::int64_t row = 0; row < args.num_rows; row += rows_of_turn)
    multiply_rows(args, row, std::min(rows_of_turn, args.num_rows - row));
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, std::optional<Tensor> scales) {
  check_linear(x, weight, scales);
  Tensor output = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  multiply(output, x, weight, scales, 1.0, false);
  return output;
}

// output += gate * x weight^T; output [R, N] contiguous.
void add_linear(const Tensor& output, const Tensor& x, const Tensor& weight, double gate,
                std::optional<Tensor> scales) {
  check_linear(x, weight, scales);
  check(output.scalar_type() == x.scalar_type() && output.dim() == 2 && output.is_contiguous() &&
            output.size(0) == x.size(0) && output.size(1) == weight.size(0),
        "add_linear: output must be contiguous ", name_of(x.scalar_type()), " [", x.size(0), ", ",
        weight.size(0), "], got ", describe(output));
  multiply(output, x, weight, scales, gate, true);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  check_rms_norm(x, weight, epsilon);
  const Tensor rows = with_contiguous_rows(x), factors = torch::stable::contiguous(weight);
  const bool has_heads = x.dim() == 3;
  Tensor output = has_heads ? torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)})
                            : torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const RmsNormArgs args{
      .x = rows.const_data_ptr(),
      .weight = factors.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .dtype = kernel_dtype(x.scalar_type()),
      .num_heads = has_heads ? x.size(1) : 1,
      .size = weight.size(0),
      .x_stride = rows.stride(0),
      .epsilon = static_cast<float>(epsilon),
  };
  torch::stable::parallel_for(0, x.size(0), rows_per_thread(args.num_heads * args.size, x.scalar_type()),
                              [&](std::int64_t begin, std::int64_t end) { cpu::rms_norm(args, begin, end); });
  return output;
}

Tensor silu_gate(const Tensor& gate_up, std::optional<Tensor> counts) {
  check_silu_gate(gate_up, counts);
  if (counts) counts = torch::stable::contiguous(*counts);
  const Tensor rows = with_contiguous_rows(gate_up);
  Tensor output = torch::stable::new_empty(gate_up, {gate_up.size(0), gate_up.size(1) / 2});
  const SiluGateArgs args = silu_gate_args(rows, counts, output);
  torch::stable::parallel_for(
      0, rows.size(0), rows_per_thread(gate_up.size(1), gate_up.scalar_type()),
      [&](std::int64_t begin, std::int64_t end) { cpu::silu_gate(args, begin, end); });
  return output;
}

void rotate(const Tensor& heads, const Tensor& cosines, const Tensor& sines) {
  check_rotate(heads, cosines, sines);
  const Tensor cos = torch::stable::contiguous(cosines), sin = torch::stable::contiguous(sines);
  const RotateArgs args = rotate_args(heads, cos, sin);
  torch::stable::parallel_for(0, heads.size(0),
                              rows_per_thread(args.num_heads * args.head_dim, heads.scalar_type()),
                              [&](std::int64_t begin, std::int64_t end) { cpu::rotate(args, begin, end); });
}

}  // namespace trimserve
