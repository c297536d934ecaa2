// The threads of a block as threads, so that ThreadSanitizer sees every pair of accesses that no barrier orders,
// whichever came first here.
//
// Only __syncthreads orders memory. The exchanges of a warp do not, as on a GPU: they are made of relaxed atomics and
// the kernel's futex, which ThreadSanitizer does not take for synchronization. All lanes must take part in one.

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr auto kRelaxed = std::memory_order_relaxed;

// For those of a block that have not returned.
class Barrier {
 public:
  void begin(unsigned count) { count_ = count; }

  void wait() {
    std::unique_lock lock(mutex_);
    const unsigned turn = turn_;
    if (++waiting_ == count_) {
      let_go();
    } else {
      is_over_.wait(lock, [&] { return turn_ != turn; });
    }
  }

  void leave() {
    const std::lock_guard lock(mutex_);
    --count_;
    if (waiting_ > 0 && waiting_ == count_) let_go();
  }

 private:
  void let_go() {
    waiting_ = 0;
    ++turn_;
    is_over_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable is_over_;
  unsigned count_ = 0, waiting_ = 0, turn_ = 0;
};

struct Warp {
  // For every second exchange: the values of the one before may not be read yet.
  std::array<std::array<std::atomic<std::uint32_t>, fibers::kWarp>, 2> values;
  std::atomic<unsigned> arrived{0};
  std::atomic<std::uint32_t> turn{0};

  void meet() {
    const std::uint32_t before = turn.load(kRelaxed);
    if (arrived.fetch_add(1, kRelaxed) + 1 == fibers::kWarp) {
      arrived.store(0, kRelaxed);
      turn.store(before + 1, kRelaxed);
      syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, fibers::kWarp, nullptr, nullptr, 0);
    } else {
      while (turn.load(kRelaxed) == before)
        syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, before, nullptr, nullptr, 0);
    }
  }
};

Barrier barrier;
std::array<Warp, kMaxThreads / fibers::kWarp> warps;
thread_local unsigned num_exchanges;
thread_local std::array<std::uint32_t, fibers::kWarp> seen;

}  // namespace

namespace fibers {

void run_block(unsigned threads, const std::function<void()>& body) {
  barrier.begin(threads);
  std::vector<std::thread> running;
  for (unsigned t = 0; t < threads; ++t) {
    running.emplace_back([t, &body] {
      threadIdx.x = t;
      body();
      barrier.leave();
    });
  }
  for (std::thread& thread : running) thread.join();
}

const std::uint32_t* exchange(std::uint32_t value) {
  Warp& warp = warps[threadIdx.x / kWarp];
  auto& values = warp.values[num_exchanges++ % 2];
  values[threadIdx.x % kWarp].store(value, kRelaxed);
  warp.meet();
  for (unsigned lane = 0; lane < kWarp; ++lane) seen[lane] = values[lane].load(kRelaxed);
  return seen.data();
}

}  // namespace fibers

void __syncthreads() { barrier.wait(); }
