#include "cpu.hpp"

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace midl {

namespace {

#if defined(__x86_64__) && defined(MIDL_COMPILES_TILES)
// Whether the processor has tile registers for bfloat16 and Linux lets this process use them, which wants to be asked.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> list = {{&kernels_baseline, true, true}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    list.push_back({&kernels_avx2, avx2, true});
    list.push_back({&kernels_avx512_emulated, avx2, false});
    list.push_back({&kernels_avx512, avx512, true});
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    list.push_back({&kernels_avx512bf16, bf16, true});
    list.push_back({&kernels_amx_emulated, avx2, false});
#if defined(MIDL_COMPILES_TILES)
    list.push_back({&kernels_amx, bf16 && has_tiles(), true});
#endif
#endif
    return list;
  }();
  return all;
}

namespace {

std::atomic<const Kernels*> in_use{nullptr};

const Kernels* most_capable() {
  const Kernels* best = nullptr;
  for (const Variant& variant : variants())
    if (variant.supported && variant.automatic) best = variant.kernels;
  return best;
}

// Freed when its thread ends.
struct Scratch {
  static constexpr std::size_t kKept = std::size_t(64) << 20;
  static constexpr std::align_val_t kAlignment{64};
  char* memory = nullptr;
  std::size_t size = 0;
  ~Scratch() { ::operator delete(memory, kAlignment); }

  char* at_least(std::size_t bytes) {
    // A single large call does not hold its memory for good.
    if (bytes > size || (size > kKept && bytes < size / 4)) {
      ::operator delete(memory, kAlignment);
      memory = nullptr, size = 0;
      memory = static_cast<char*>(::operator new(bytes, kAlignment));
      size = bytes;
    }
    return memory;
  }
};

}  // namespace

char* scratch(std::size_t bytes) {
  thread_local Scratch mine;
  return mine.at_least(bytes);
}

const Kernels& current() {
  const Kernels* kernels = in_use.load(std::memory_order_acquire);
  if (!kernels) {
    kernels = most_capable();
    in_use.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void use_variant(const std::string& name) {
  std::string known;
  for (const Variant& variant : variants()) {
    if (variant.supported && name == variant.kernels->name) {
      in_use.store(variant.kernels, std::memory_order_release);
      return;
    }
    if (variant.supported) known += std::string(known.empty() ? "" : ", ") + variant.kernels->name;
  }
  throw std::invalid_argument("'" + name + "' is not an instruction set that this processor runs, expected one of " +
                              known);
}

}  // namespace midl
