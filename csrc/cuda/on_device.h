// Where an op's kernels go: the device of its tensors and torch's current stream of it.

#pragma once

#include <memory>

#include "checks.h"
#include "launchers.h"

namespace trimserve::cuda {

struct OnDevice {
  std::shared_ptr<void> guard;  // makes the device the current one as long as it lives
  Stream stream;
};

OnDevice on_device(const Tensor& tensor);

}  // namespace trimserve::cuda
