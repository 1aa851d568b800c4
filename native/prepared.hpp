// A layer's inference call with everything but the input settled beforehand; see prepared.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace midl {

// A hash of values spread evenly over a tensor.
std::uint64_t sample(std::uintptr_t data, std::int64_t bytes);

void bind_prepared(nanobind::module_& m);

}  // namespace midl
