// Runs kernels on the host: the counterpart of csrc/cuda/launch.cuh.
#pragma once

#include <cxxabi.h>

#include <string>
#include <typeinfo>
#include <vector>

#include "cuda/device.h"

namespace speeder {
namespace cuda {

class HostLauncher {
 public:
  // `dry`: notes what would be launched, and launches nothing.
  HostLauncher(uint64_t seed, bool dry) : dry_(dry) { host::seed(seed); }

  // Block by block, in an order drawn from the seed.
  template <typename Kernel>
  void launch(const Grid& grid, const Kernel& kernel) {
    if (!error_.empty()) return;
    constexpr int64_t kSharedMost = 227 * 1024;  // on sm_90 and sm_100
    if (grid.threads <= 0 || grid.threads % kWarp != 0 || grid.threads > Kernel::kThreads ||
        grid.shared_bytes > kSharedMost || grid.y > 65535 || grid.z > 65535) {
      error_ = "a launch that no GPU takes: " + std::to_string(grid.threads) + " threads, " +
               std::to_string(grid.shared_bytes) + " bytes of shared memory";
      return;
    }
    note(typeid(Kernel).name(), grid);
    if (dry_) return;
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
  std::string launches_;
  std::string error_;
};

}  // namespace cuda
}  // namespace speeder
