// Where an op's kernels run: the device of its tensors and torch's current stream there.

#pragma once

#include <memory>

#include "checks.h"
#include "launchers.h"

namespace trimserve::cuda {

struct OnDevice {
  std::shared_ptr<void> guard;  // makes the device current while it lives
  Stream stream;
};

OnDevice on_device(const Tensor& tensor);

}  // namespace trimserve::cuda
