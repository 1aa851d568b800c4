// Carves the buffers of a call out of one piece of scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.hpp"

namespace {

// With a null base it only adds up sizes: run the same takes twice, first to measure, then to carve.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <class T>
  T* take(std::int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (std::size_t(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace
