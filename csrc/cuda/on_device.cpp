// on_device for CUDA tensors; the tests that run kernels on the CPU link their own.

#include "on_device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

namespace trimserve::cuda {

OnDevice on_device(const Tensor& tensor) {
  const std::int32_t device = tensor.get_device_index();
  auto guard = std::make_shared<torch::stable::accelerator::DeviceGuard>(device);
  void* stream = nullptr;
  // Checked by hand: torch's macro for it is not in every release that this is built with.
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("torch did not tell the current CUDA stream");
  }
  return {std::move(guard), static_cast<Stream>(stream)};
}

}  // namespace trimserve::cuda
