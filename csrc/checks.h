// How ops check their arguments: a failed check throws std::invalid_argument, which reaches Python as ValueError
// with exactly our text (ADR-0001).

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <sstream>
#include <stdexcept>

namespace trimserve {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// A tensor in words, "int32 [2, 32]". Written only when a check fails: an op of a few microseconds must not
// format text.
struct Description {
  const Tensor& tensor;
};

inline Description describe(const Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& text, const Description& description) {
  const Tensor& tensor = description.tensor;
  text << name_of(tensor.scalar_type()) << " [";
  for (std::int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  return text << "]";
}

template <typename... Parts>
void check(bool is_valid, const Parts&... parts) {
  if (is_valid) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Throws unless `dtype`, in words `shape`, is what the tensor is.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                         const char* shape, bool has_shape) {
  check(tensor.scalar_type() == dtype && has_shape, op, ": ", name, " must be ", name_of(dtype), " ", shape,
        ", got ", describe(tensor));
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

// A tensor's device in words, "cuda:0".
struct Place {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& text, const Place& place) {
  if (place.tensor.is_cpu()) return text << "cpu";
  if (place.tensor.is_cuda()) return text << "cuda:" << place.tensor.get_device_index();
  return text << "a device that is neither cpu nor cuda";
}

// Throws unless all tensors are on the first one's device.
inline void check_devices(const char* op, const Named& first, std::initializer_list<Named> others) {
  const bool is_cpu = first.tensor.is_cpu(), is_cuda = first.tensor.is_cuda();
  for (const Named& other : others) {
    check(other.tensor.is_cpu() == is_cpu && other.tensor.is_cuda() == is_cuda &&
              other.tensor.get_device_index() == first.tensor.get_device_index(),
          op, ": ", other.name, " must be on ", Place{first.tensor}, " like ", first.name, ", got ",
          Place{other.tensor});
  }
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Throws unless all values of a contiguous int64 tensor are in [0, bound).
inline void check_indices(const char* op, const char* name, const Tensor& indices, std::int64_t bound) {
  const auto* values = static_cast<const std::int64_t*>(indices.const_data_ptr());
  for (std::int64_t i = 0; i < indices.numel(); ++i) {
    check(0 <= values[i] && values[i] < bound, op, ": ", name, " must be in [0, ", bound, "), got ",
          values[i]);
  }
}

}  // namespace trimserve
