// Asynchronous copies to shared memory, for fibers: made no sooner than they are waited for, so that a missing wait
// shows.

#pragma once

#include <array>
#include <deque>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace fibers {

struct Copy {
  void* target;
  const void* source;
  std::size_t size;
};

struct Copies {
  std::vector<Copy> begun;
  std::deque<std::vector<Copy>> committed;
};
inline std::array<Copies, 1024> copies;  // of each thread of the block

}  // namespace fibers

inline void __pipeline_memcpy_async(void* target, const void* source, std::size_t size) {
  fibers::copies[threadIdx.x].begun.push_back({target, source, size});
}

inline void __pipeline_commit() {
  fibers::Copies& own = fibers::copies[threadIdx.x];
  own.committed.push_back(std::exchange(own.begun, {}));
}

inline void __pipeline_wait_prior(std::size_t count) {
  auto& committed = fibers::copies[threadIdx.x].committed;
  for (; committed.size() > count; committed.pop_front()) {
    for (const fibers::Copy& copy : committed.front()) std::memcpy(copy.target, copy.source, copy.size);
  }
}
