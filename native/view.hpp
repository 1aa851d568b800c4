// Where a tensor lies in memory, without torch's headers.
//
// torch 2.10 and later hand it out by one call of DLPack's exchange API (dlpack.h; version 1.3); older ones are asked for
// each attribute by itself, which takes several times as long.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace midl {

namespace nb = nanobind;

inline nb::object checked(PyObject* result) {
  if (!result) throw nb::python_error();
  return nb::steal(result);
}

// Interned once: attribute reads by such names cost tens of nanoseconds.
inline nb::object interned(const char* text) { return checked(PyUnicode_InternFromString(text)); }

// The types that kernels know; everything else is other.
enum class Element { float32, bfloat16, other };

// A tensor of torch.Tensor itself or torch.nn.Parameter; valid as long as the tensor is unchanged.
class View {
 public:
  static constexpr int kMostAxes = 8;

  const void* data = nullptr;
  const std::int64_t *shape = nullptr, *strides = nullptr;
  int axes = 0;
  Element element = Element::other;
  bool on_cpu = false;

  // False where the tensor has no memory with strides (sparse, nested, meta, within a transform, a lazy zero), or more axes.
  bool read(PyObject* tensor) { return (exchange().view ? read_at_once(tensor) : read_by_attributes(tensor)) && (data || elements() == 0); }

  std::int64_t elements() const {
    std::int64_t count = 1;
    for (int i = 0; i < axes; ++i) count *= shape[i];
    return count;
  }
  bool is_contiguous() const {
    std::int64_t expected = 1;
    for (int i = axes - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return elements() == 0;
      expected *= shape[i];
    }
    return true;
  }

 private:
  // dlpack.h
  struct Tensor {
    void* data;
    struct { std::int32_t type, id; } device;
    std::int32_t ndim;
    struct { std::uint8_t code, bits; std::uint16_t lanes; } dtype;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
  };
  struct Api {
    struct { std::uint32_t major, minor; } version;
    Api* previous;
    void *allocate, *managed, *to_python;
    int (*view)(void* tensor, Tensor* out);
    void* stream;
  };
  static constexpr int kCpu = 1, kFloat = 2, kBfloat = 4;

  struct Exchange {
    int (*view)(void*, Tensor*) = nullptr;
    nb::object is_cpu = interned("is_cpu"), dtype = interned("dtype"), shape = interned("shape"), stride = interned("stride"),
               data_ptr = interned("data_ptr"), float32, bfloat16;
    Exchange() {
      const nb::object torch = nb::module_::import_("torch");
      float32 = torch.attr("float32"), bfloat16 = torch.attr("bfloat16");
      const nb::object capsule = nb::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", nb::none());
      if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
      const auto* api = static_cast<const Api*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (api->version.major == 1) view = api->view;
    }
  };
  static const Exchange& exchange() {
    static const Exchange* exchange = new Exchange;  // until the interpreter is gone
    return *exchange;
  }

  bool read_at_once(PyObject* tensor) {
    Tensor seen;
    if (exchange().view(tensor, &seen) != 0) {
      PyErr_Clear();
      return false;
    }
    if (!seen.strides && seen.ndim > 0) return false;
    data = seen.data ? static_cast<const char*>(seen.data) + seen.byte_offset : nullptr;
    shape = seen.shape, strides = seen.strides, axes = seen.ndim;
    on_cpu = seen.device.type == kCpu;
    const bool is_float = seen.dtype.code == kFloat && seen.dtype.bits == 32, is_bfloat = seen.dtype.code == kBfloat && seen.dtype.bits == 16;
    element = seen.dtype.lanes != 1 ? Element::other : is_float ? Element::float32 : is_bfloat ? Element::bfloat16 : Element::other;
    return true;
  }

  bool read_by_attributes(PyObject* tensor) {
    const Exchange& names = exchange();
    const auto attribute = [&](const nb::object& name) { return nb::steal(PyObject_GetAttr(tensor, name.ptr())); };
    const auto method = [&](const nb::object& name) { return nb::steal(PyObject_CallMethodNoArgs(tensor, name.ptr())); };
    const nb::object cpu = attribute(names.is_cpu), type = attribute(names.dtype), sizes = attribute(names.shape);
    const nb::object steps = sizes.is_valid() ? method(names.stride) : nb::object(), address = steps.is_valid() ? method(names.data_ptr) : nb::object();
    if (!cpu.is_valid() || !type.is_valid() || !address.is_valid() || PyTuple_GET_SIZE(sizes.ptr()) > kMostAxes) {
      PyErr_Clear();
      return false;
    }
    on_cpu = cpu.ptr() == Py_True;
    element = type.ptr() == names.float32.ptr() ? Element::float32 : type.ptr() == names.bfloat16.ptr() ? Element::bfloat16 : Element::other;
    axes = int(PyTuple_GET_SIZE(sizes.ptr()));
    for (int i = 0; i < axes; ++i) {
      sizes_[i] = nb::cast<std::int64_t>(nb::handle(PyTuple_GET_ITEM(sizes.ptr(), i)));
      steps_[i] = nb::cast<std::int64_t>(nb::handle(PyTuple_GET_ITEM(steps.ptr(), i)));
    }
    shape = sizes_, strides = steps_;
    data = reinterpret_cast<const void*>(nb::cast<std::uintptr_t>(address));
    return true;
  }

  std::int64_t sizes_[kMostAxes], steps_[kMostAxes];
};

}  // namespace midl
