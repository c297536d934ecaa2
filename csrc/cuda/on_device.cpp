// on_device for CUDA tensors; the tests that run kernels on the CPU link their own.

#include "on_device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace trimserve::cuda {

OnDevice on_device(const Tensor& tensor) {
  const std::int32_t device = tensor.get_device_index();
  auto guard = std::make_shared<torch::stable::accelerator::DeviceGuard>(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return {std::move(guard), static_cast<Stream>(stream)};
}

}  // namespace trimserve::cuda
