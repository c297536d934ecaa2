// The threads of a block as fibers, and the device of ops that run on them.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>

#include "cuda/on_device.h"
#include "cuda_runtime.h"

namespace {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;

enum class State { kReady, kAtBarrier, kInExchange, kDone };

struct Fiber {
  State state;
  unsigned num_exchanges;
  std::unique_ptr<char[]> stack;  // null until it runs first
  jmp_buf place;                  // where it goes on
};

std::array<Fiber, kMaxThreads> all_fibers;
// Of each warp, for every second exchange: the values of the one before may not be read yet.
std::array<std::array<std::array<std::uint32_t, fibers::kWarp>, 2>, kMaxThreads / fibers::kWarp> values;
const std::function<void()>* kernel;
jmp_buf scheduler;

// Gives way. Not by swapcontext, which would make two system calls.
void wait(State state) {
  Fiber& fiber = all_fibers[threadIdx.x];
  fiber.state = state;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
  for (;;) {
    (*kernel)();
    wait(State::kDone);
  }
}

void resume(unsigned thread) {
  Fiber& fiber = all_fibers[thread];
  threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.place, 1);
  fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

// Lets threads [begin, end) go on if all of them that are not done wait in `state`. Returns whether some do.
bool release(unsigned begin, unsigned end, State state) {
  const auto first = all_fibers.begin() + begin, last = all_fibers.begin() + end;
  const auto is_in = [](State wanted) {
    return [wanted](const Fiber& fiber) { return fiber.state == wanted; };
  };
  if (std::all_of(first, last, is_in(State::kDone))) return false;
  if (!std::all_of(first, last,
                   [&](const Fiber& fiber) { return fiber.state == state || fiber.state == State::kDone; }))
    return false;
  std::for_each(first, last, [&](Fiber& fiber) {
    if (fiber.state == state) fiber.state = State::kReady;
  });
  return true;
}

}  // namespace

namespace fibers {

void run_block(unsigned threads, const std::function<void()>& body) {
  static bool is_reversed = false;
  is_reversed = !is_reversed;
  kernel = &body;
  for (unsigned t = 0; t < threads; ++t) {
    all_fibers[t].state = State::kReady;
    all_fibers[t].num_exchanges = 0;
  }
  const unsigned num_warps = (threads + kWarp - 1) / kWarp;
  do {
    for (unsigned i = 0; i < num_warps; ++i) {
      const unsigned begin = (is_reversed ? num_warps - 1 - i : i) * kWarp,
                     end = std::min(begin + kWarp, threads);
      do {  // a warp runs as far ahead of the others as it can
        for (unsigned t = begin; t < end; ++t) {
          if (all_fibers[t].state == State::kReady) resume(t);
        }
      } while (release(begin, end, State::kInExchange));
    }
  } while (release(0, threads, State::kAtBarrier));
  for (unsigned t = 0; t < threads; ++t) {
    if (all_fibers[t].state != State::kDone)
      throw std::logic_error("threads of a block wait for others that do not come");
  }
}

const std::uint32_t* exchange(std::uint32_t value) {
  auto& of_warp = values[threadIdx.x / kWarp][all_fibers[threadIdx.x].num_exchanges++ % 2];
  of_warp[threadIdx.x % kWarp] = value;
  wait(State::kInExchange);
  return of_warp.data();
}

}  // namespace fibers

extern "C" __attribute__((visibility("default"))) std::uint64_t trimserve_num_launches() {
  return fibers::num_launches;
}

void __syncthreads() { wait(State::kAtBarrier); }

namespace trimserve::cuda {

OnDevice on_device(const Tensor&) { return {}; }

}  // namespace trimserve::cuda
