// Which instruction sets this build holds, which of them this processor runs, and which is in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace midl {

struct Variant {
  const Kernels* kernels;
  bool supported;  // by this processor
  bool automatic;  // may be chosen without being asked for
};

// From the least to the most capable.
const std::vector<Variant>& variants();

// The kernels in use: the most capable supported ones until use_variant says otherwise.
const Kernels& current();

// Throws std::invalid_argument with the names that would do.
void use_variant(const std::string& name);

}  // namespace midl
