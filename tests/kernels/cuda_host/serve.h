// A program that runs kernels for host_device.py: requests come on standard input and are answered
// on standard output.
//
// Request: length and name of the function, the seed of the order in which threads run, whether to
// run nothing and only tell what would be launched, the bytes of shared memory that a block may
// have, the number of arguments, and each of them: a letter, then an integer (i, eight bytes), a
// float64 (d), nothing (n: a null pointer) or a tensor (t: its bytes, their number first, and where
// it lies between two multiples of 16). Answer: length and text of the error, then, if there is
// none, the tensors' bytes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "host_launcher.h"

extern "C" inline __attribute__((used)) const char* __asan_default_options() {
  return "detect_leaks=0";  // what a fiber owns when it is given up
}

namespace speeder {
namespace cuda {
namespace host {

class Arguments {
 public:
  int64_t integer() { return next('i').integer; }
  double real() { return next('d').real; }
  DType dtype() { return static_cast<DType>(integer()); }

  // A tensor's elements, in an allocation that ends where the tensor does; null where it is None.
  template <typename T>
  T* pointer() {
    if (at_ < values_.size() && values_[at_].letter == 'n') return ++at_, nullptr;
    const Value& value = next('t');
    return reinterpret_cast<T*>(value.memory.get() + value.skip);
  }

  void read() {
    values_.resize(take<uint32_t>());
    for (Value& value : values_) {
      value.letter = take<char>();
      if (value.letter == 'i') value.integer = take<int64_t>();
      if (value.letter == 'd') value.real = take<double>();
      if (value.letter != 't') continue;
      value.bytes = take<int64_t>();
      value.skip = take<int64_t>();
      value.memory.reset(new char[value.skip + value.bytes]);
      take_bytes(value.memory.get() + value.skip, value.bytes);
    }
  }

  void write() const {
    for (const Value& value : values_) {
      if (value.letter == 't') fwrite(value.memory.get() + value.skip, 1, value.bytes, stdout);
    }
  }

  template <typename T>
  static T take() {
    T value;
    take_bytes(&value, sizeof(value));
    return value;
  }

  static void take_bytes(void* to, int64_t bytes) {
    if (fread(to, 1, bytes, stdin) != static_cast<size_t>(bytes))
      exit(0);  // the other side is done
  }

 private:
  struct Value {
    char letter;
    int64_t integer;
    double real;
    int64_t bytes;
    int64_t skip;
    std::unique_ptr<char[]> memory;
  };

  const Value& next(char letter) {
    if (at_ == values_.size() || values_[at_].letter != letter) {
      fprintf(stderr, "argument %zu: expected one of kind %c\n", at_, letter);
      exit(1);
    }
    return values_[at_++];
  }

  std::vector<Value> values_;
  size_t at_ = 0;
};

struct Entry {
  const char* name;
  void (*run)(Arguments& arguments, HostLauncher& launcher);
};

template <size_t kCount>
inline int serve(const Entry (&entries)[kCount]) {
  for (;;) {
    std::string name(Arguments::take<uint32_t>(), ' ');
    Arguments::take_bytes(&name[0], static_cast<int64_t>(name.size()));
    const uint64_t seed = Arguments::take<uint64_t>();
    const bool dry = Arguments::take<bool>();
    HostLauncher launcher(seed, dry, Arguments::take<int64_t>());
    Arguments arguments;
    arguments.read();
    const Entry* found = nullptr;
    for (const Entry& entry : entries) {
      if (name == entry.name) found = &entry;
    }
    if (found == nullptr) {
      fprintf(stderr, "no kernel is called %s\n", name.c_str());
      return 1;
    }
    found->run(arguments, launcher);
    const std::string error = launcher.error() == nullptr ? "" : launcher.error();
    for (const std::string& text : {error, launcher.launches()}) {
      const uint32_t length = static_cast<uint32_t>(text.size());
      fwrite(&length, sizeof(length), 1, stdout);
      fwrite(text.data(), 1, length, stdout);
    }
    if (error.empty()) arguments.write();
    fflush(stdout);
  }
}

}  // namespace host
}  // namespace cuda
}  // namespace speeder
