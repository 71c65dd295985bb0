// Runs kernels on the host: the counterpart of csrc/cuda/common/stream_launcher.cuh.
#pragma once

#include <cxxabi.h>

#include <string>
#include <typeinfo>
#include <vector>

#include "cuda/common/launch_limits.h"

namespace speeder {
namespace cuda {

class HostLauncher {
 public:
  // `dry`: notes what would be launched, and launches nothing. `shared_most`: bytes of shared
  // memory that a block may have.
  HostLauncher(uint64_t seed, bool dry, int64_t shared_most)
      : dry_(dry), shared_most_(shared_most) {
    host::seed(seed);
  }

  // Block by block, in an order drawn from the seed.
  template <typename Kernel>
  void launch(const Grid& grid, const Kernel& kernel) {
    if (!error_.empty()) return;
    if (const char* reason = refusal(grid, shared_most_)) {
      error_ = reason;
      return;
    }
    if (grid.threads <= 0 || grid.threads % kWarp != 0 || grid.threads > Kernel::kThreads) {
      error_ =
          "blocks of " + std::to_string(grid.threads) + " threads, which the kernel does not take";
      return;
    }
    note(typeid(Kernel).name(), grid);
    if (dry_) return;
    host::start_launch();
    std::vector<int64_t> order(grid.x * grid.y * grid.z);
    for (size_t n = 0; n < order.size(); ++n) {
      const size_t place = host::random_below(static_cast<uint32_t>(n + 1));
      order[n] = order[place];
      order[place] = static_cast<int64_t>(n);
    }
    host::now.blocks[0] = grid.x;
    host::now.blocks[1] = grid.y;
    host::now.blocks[2] = grid.z;
    for (int64_t n : order) {
      host::now.block[0] = n % grid.x;
      host::now.block[1] = n / grid.x % grid.y;
      host::now.block[2] = n / grid.x / grid.y;
      const auto body = [](const void* code) { (*static_cast<const Kernel*>(code))(); };
      const char* wrong = host::run_block(body, &kernel, grid.threads, grid.shared_bytes);
      if (wrong != nullptr) {
        error_ = wrong;
        return;
      }
    }
  }

  int64_t shared_most() const { return shared_most_; }

  // Null, or what went wrong.
  const char* error() const { return error_.empty() ? nullptr : error_.c_str(); }

  // A line for each launch: kernel, blocks in x, y and z, threads, bytes of shared memory; by tabs.
  const std::string& launches() const { return launches_; }

 private:
  void note(const char* mangled, const Grid& grid) {
    char* name = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
    launches_ += name;
    free(name);
    for (int64_t n : {grid.x, grid.y, grid.z, int64_t{grid.threads}, grid.shared_bytes}) {
      launches_ += '\t' + std::to_string(n);
    }
    launches_ += '\n';
  }

  bool dry_;
  int64_t shared_most_;
  std::string launches_;
  std::string error_;
};

}  // namespace cuda
}  // namespace speeder
