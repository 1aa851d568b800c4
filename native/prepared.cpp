// The classes PreparedLinear and PreparedConvolution: small layers are over in microseconds, and so must be what surrounds their kernel.
//
// It holds addresses and sizes, checks in a few attribute reads that the parameters are the ones it was made for, in the
// state it was made for, and that the input is of its kind; what does not pass is left to the general path.
#include "prepared.hpp"

#include <nanobind/stl/array.h>


#include <array>
#include <cstring>
#include <vector>

#include "cpu.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using std::int64_t;

namespace midl {

std::uint64_t sample(std::uintptr_t data, int64_t bytes) {
  // One word from each of 61 stretches, at places without a period: masks of rows or columns are seen.
  constexpr int64_t kSamples = 61;
  const int64_t words = bytes / 4, step = words / kSamples < 1 ? 1 : words / kSamples;
  std::uint64_t hash = 14695981039346656037u;
  std::uint32_t random = 0;  // the first word is one of them
  for (int64_t i = 0; i < words; i += step) {
    const int64_t at = i + int64_t(std::uint64_t(random) * std::uint64_t(step) >> 32);
    random = random * 1664525u + 1013904223u;
    std::uint32_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(data) + 4 * (at < words ? at : words - 1), 4);
    hash = (hash ^ word) * 1099511628211u;
  }
  return hash;
}

namespace {

// Interned once: attribute reads by these names cost tens of nanoseconds.
PyObject* name_of(const char* text) { return PyUnicode_InternFromString(text); }
struct Names {
  PyObject *version = name_of("_version"), *data_ptr = name_of("data_ptr"), *is_contiguous = name_of("is_contiguous"),
           *stride = name_of("stride"), *permute = name_of("permute"), *shape = name_of("shape"), *dtype = name_of("dtype"), *is_cpu = name_of("is_cpu"),
           *new_empty = name_of("new_empty"), *int32 = name_of("int32"), *dtype_keyword = PyTuple_Pack(1, dtype);
};
const Names& names() {
  static const Names all;
  return all;
}

nb::object checked(PyObject* result) {
  if (!result) throw nb::python_error();
  return nb::steal(result);
}
nb::object attribute(PyObject* object, PyObject* name) { return checked(PyObject_GetAttr(object, name)); }
nb::object method(PyObject* object, PyObject* name) { return checked(PyObject_CallMethodNoArgs(object, name)); }
std::uintptr_t address_of(PyObject* tensor) { return nb::cast<std::uintptr_t>(method(tensor, names().data_ptr)); }
bool equal(const nb::object& a, const nb::object& b) {
  const int result = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
  if (result < 0) throw nb::python_error();
  return result;
}
bool is_contiguous(PyObject* tensor) { return method(tensor, names().is_contiguous).ptr() == Py_True; }

// One of the layer's parameters as it was when the call was prepared.
struct Parameter {
  nb::object name, reference;  // key in the module's dict; weak reference, or None where the layer has no such parameter
  nb::object shape, strides, dtype;
  std::uintptr_t address = 0;
  int64_t version = 0, bytes = 0;
  std::uint64_t values = 0;
  std::size_t index = 0;
  bool copied = false;  // into panels, so that its values count; others are read at every call

  // Whether the call may take `now` for it; `at` becomes the address to read.
  bool fits(PyObject* now, std::uintptr_t& at) const {
    at = 0;
    if (reference.is_none() || now == Py_None) return reference.is_none() && now == Py_None;
    at = address_of(now);
    if (!equal(method(now, names().stride), strides)) return false;
    // Identity by weak reference: a mere address may be used again.
    const bool same = checked(PyObject_CallNoArgs(reference.ptr())).ptr() == now && at == address;
    if (copied)
      return same && nb::cast<int64_t>(attribute(now, names().version)) == version && sample(address, bytes) == values;
    // A compiled graph makes the smallest parameters anew in every call.
    return same || (equal(attribute(now, names().shape), shape) && attribute(now, names().dtype).ptr() == dtype.ptr() &&
                    attribute(now, names().is_cpu).ptr() == Py_True);
  }
};

constexpr std::size_t kParameters = 6;

// The parameters of a layer as they were when a call was prepared.
class Parameters {
 public:
  // `states` holds (version, address, sample) of those that panels copy, by name. What `parameters` lacks exists as panels
  // alone, whose address stands for its own.
  Parameters(nb::dict parameters, nb::dict states, const void* panels) {
    static constexpr const char* kNames[kParameters] = {"weight",   "bias",        "light_down",
                                                        "light_up", "gate_weight", "gate_bias"};
    for (std::size_t i = 0; i < kParameters; ++i) {
      nb::object name = nb::steal(name_of(kNames[i]));
      if (!parameters.contains(name)) {
        addresses_[i] = reinterpret_cast<std::uintptr_t>(panels);
        continue;
      }
      Parameter& p = present_.emplace_back();
      p.index = i;
      p.name = std::move(name);
      nb::object tensor = parameters[p.name];
      if (tensor.is_none()) {
        p.reference = nb::none();
        continue;
      }
      p.reference = checked(PyWeakref_NewRef(tensor.ptr(), nullptr));
      p.address = address_of(tensor.ptr());
      p.shape = attribute(tensor.ptr(), names().shape);
      p.strides = method(tensor.ptr(), names().stride);
      p.dtype = attribute(tensor.ptr(), names().dtype);
      if (states.contains(p.name)) {
        // As read when the panels were made, not now: another thread may have changed the parameter since.
        nb::tuple state = nb::cast<nb::tuple>(states[p.name]);
        p.copied = true;
        p.version = nb::cast<int64_t>(state[0]);
        p.address = nb::cast<std::uintptr_t>(state[1]);
        p.values = nb::cast<std::uint64_t>(state[2]);
        p.bytes = nb::cast<int64_t>(tensor.attr("nbytes"));
      }
      addresses_[i] = p.address;
    }
  }

  // Those of one call, kept alive: other threads may drop them.
  struct Held {
    std::array<nb::object, kParameters> objects;
    std::array<std::uintptr_t, kParameters> addresses;

    const void* address(std::size_t i) const { return reinterpret_cast<const void*>(addresses[i]); }
  };

  // Whether the call may take those in the dict for these.
  bool fit(nb::dict parameters, Held& held) const {
    held.addresses = addresses_;
    for (const Parameter& p : present_) {
      nb::object& now = held.objects[p.index] = nb::borrow(PyDict_GetItem(parameters.ptr(), p.name.ptr()));
      if (!now || !p.fits(now.ptr(), held.addresses[p.index])) return false;
    }
    return true;
  }
  const void* address(std::size_t i) const { return reinterpret_cast<const void*>(addresses_[i]); }

 private:
  std::array<std::uintptr_t, kParameters> addresses_{};
  std::vector<Parameter> present_;
};

const void* panels_at(const nb::object& t) {
  return t.is_none() ? nullptr : reinterpret_cast<const void*>(address_of(t.ptr()));
}

// An output for x. Of what malloc would map every time (see midl.ops.huge_pages) Python takes care.
nb::object new_output(PyObject* x, PyObject* shape, int64_t elements, Storage storage) {
  constexpr int64_t kAlwaysMapped = 32 << 20;
  if (elements * (storage == Storage::bfloat16 ? 2 : 4) >= kAlwaysMapped)
    return nb::module_::import_("midl.ops.huge_pages").attr("empty_where_mapped")(nb::handle(shape), attribute(x, names().dtype));
  PyObject* arguments[] = {x, shape};
  return checked(PyObject_VectorcallMethod(names().new_empty, arguments, 2, nullptr));
}

// Where the selection goes.
nb::object new_selection(PyObject* x, PyObject* shape) {
  static const nb::object* int32 = new nb::object(attribute(nb::module_::import_("torch").ptr(), names().int32));
  PyObject* arguments[] = {x, shape, int32->ptr()};
  return checked(PyObject_VectorcallMethod(names().new_empty, arguments, 2, names().dtype_keyword));
}

class PreparedLinear {
 public:
  PreparedLinear(nb::dict parameters, nb::dict states, nb::object dtype, bool bfloat16, int64_t depth, int64_t neurons,
                 int64_t rank, int64_t groups, int64_t selected_groups, float threshold, bool hard,
                 nb::object packed_light, nb::object packed_weight, nb::object dense_product)
      : dtype_(std::move(dtype)), packed_light_(std::move(packed_light)), packed_weight_(std::move(packed_weight)),
        dense_product_(std::move(dense_product)), kernels_(&current()), parameters_(parameters, states, panels_at(packed_light_)) {
    call_ = {
        .storage = bfloat16 ? Storage::bfloat16 : Storage::float32,
        .x = nullptr, .x_stride = depth, .rows = 0, .depth = depth, .neurons = neurons, .rank = rank, .groups = groups,
        .selected_groups = selected_groups, .threshold = threshold, .positions = 0, .span = 1, .weight = parameters_.address(0),
        .bias = parameters_.address(1), .light_down = parameters_.address(2),
        .light_up = parameters_.address(3), .gate_weight = parameters_.address(4),
        .gate_bias = parameters_.address(5), .noise = nullptr, .packed_light = panels_at(packed_light_),
        .packed_weight = panels_at(packed_weight_), .full = nullptr, .hard = hard, .y = nullptr, .selected = nullptr,
        .threads = 1,
    };
  }

  // y, or with `selection` y and the groups selected, or None where this call was not prepared for x or for the
  // parameters as they are now.
  nb::object run(nb::handle x, nb::dict parameters, int threads, bool selection) const {
    if (&current() != kernels_) return nb::none();
    Parameters::Held held;
    if (!parameters_.fit(parameters, held)) return nb::none();
    if (attribute(x.ptr(), names().dtype).ptr() != dtype_.ptr() || !is_contiguous(x.ptr()) ||
        attribute(x.ptr(), names().is_cpu).ptr() != Py_True)
      return nb::none();
    nb::object shape = attribute(x.ptr(), names().shape);
    const Py_ssize_t axes = PyTuple_GET_SIZE(shape.ptr());
    if (axes == 0) return nb::none();
    nb::object y_shape = checked(PyTuple_New(axes));
    LinearForward call = call_;
    call.rows = 1;
    for (Py_ssize_t i = 0; i < axes; ++i) {
      nb::object size = nb::borrow(PyTuple_GET_ITEM(shape.ptr(), i));
      const int64_t length = nb::cast<int64_t>(size);
      if (i + 1 < axes) {
        call.rows *= length;
      } else {
        if (length != call.depth) return nb::none();
        size = nb::int_(call.neurons);
      }
      PyTuple_SET_ITEM(y_shape.ptr(), i, size.release().ptr());
    }
    nb::object y = new_output(x.ptr(), y_shape.ptr(), call.rows * call.neurons, call.storage);
    nb::object selected;
    if (selection) {
      nb::list sizes(shape);
      sizes[axes - 1] = call.selected_groups;
      selected = new_selection(x.ptr(), nb::tuple(sizes).ptr());
      call.selected = reinterpret_cast<std::int32_t*>(address_of(selected.ptr()));
    }
    nb::object full;
    if (!dense_product_.is_none()) {
      full = dense_product_(x, held.objects[0]);
      call.full = reinterpret_cast<const void*>(address_of(full.ptr()));
    }
    call.x = reinterpret_cast<const void*>(address_of(x.ptr()));
    call.y = reinterpret_cast<void*>(address_of(y.ptr()));
    call.positions = call.rows;
    call.bias = held.address(1);
    call.gate_bias = held.address(5);
    call.threads = threads;
    {
      nb::gil_scoped_release released;
      kernels_->linear_forward(call);
    }
    return selection ? nb::make_tuple(y, selected) : y;
  }

 private:
  nb::object dtype_, packed_light_, packed_weight_, dense_product_;
  const Kernels* kernels_;
  Parameters parameters_;
  LinearForward call_;
};

// The same for a convolution of images of one size and memory format; its parameters are of the images' type.
class PreparedConvolution {
 public:
  PreparedConvolution(nb::dict parameters, nb::dict states, nb::object x, bool bfloat16, nb::object y_shape,
                      nb::object selected_shape, const std::array<int64_t, 17>& images, int64_t rows, int64_t neurons, int64_t rank,
                      int64_t groups, int64_t selected_groups, float threshold, int64_t positions, int64_t span,
                      bool hard, nb::object packed_light, nb::object packed_weight, nb::object dense_product)
      : x_shape_(attribute(x.ptr(), names().shape)), x_strides_(method(x.ptr(), names().stride)),
        dtype_(attribute(x.ptr(), names().dtype)), y_shape_(std::move(y_shape)),
        selected_shape_(std::move(selected_shape)), packed_light_(std::move(packed_light)), packed_weight_(std::move(packed_weight)),
        dense_product_(std::move(dense_product)), kernels_(&current()), parameters_(parameters, states, panels_at(packed_light_)) {
    static_assert(sizeof(Images) == sizeof images);
    const void* light = panels_at(packed_light_);
    call_.storage = bfloat16 ? Storage::bfloat16 : Storage::float32;
    std::memcpy(&call_.images, images.data(), sizeof images);
    call_.rows = {
        .storage = call_.storage, .x = nullptr, .x_stride = 0, .rows = rows,
        .depth = call_.images.channels * call_.images.kernel_height * call_.images.kernel_width, .neurons = neurons,
        .rank = rank, .groups = groups, .selected_groups = selected_groups, .threshold = threshold,
        .positions = positions, .span = span,
        // Never read but light_up: panels take their place.
        .weight = nullptr, .bias = parameters_.address(1), .light_down = light, .light_up = parameters_.address(3),
        .gate_weight = parameters_.address(4) ? light : nullptr, .gate_bias = parameters_.address(5),
        .noise = nullptr, .packed_light = light, .packed_weight = panels_at(packed_weight_), .full = nullptr,
        .hard = hard, .y = nullptr, .selected = nullptr, .threads = 1,
    };
  }

  // y (B, n, H, W) and the rest as PreparedLinear.
  nb::object run(nb::handle x, nb::dict parameters, int threads, bool selection) const {
    Parameters::Held held;
    if (&current() != kernels_ || !parameters_.fit(parameters, held)) return nb::none();
    if (attribute(x.ptr(), names().dtype).ptr() != dtype_.ptr() ||
        attribute(x.ptr(), names().is_cpu).ptr() != Py_True ||
        !equal(attribute(x.ptr(), names().shape), x_shape_) || !equal(method(x.ptr(), names().stride), x_strides_))
      return nb::none();
    nb::object y = new_output(x.ptr(), y_shape_.ptr(), call_.rows.rows * call_.rows.neurons, call_.storage);
    ConvolutionForward call = call_;
    nb::object selected;
    if (selection) {
      selected = new_selection(x.ptr(), selected_shape_.ptr());
      call.rows.selected = reinterpret_cast<std::int32_t*>(address_of(selected.ptr()));
    }
    nb::object full;  // (B, n, H, W), channels last
    if (!dense_product_.is_none()) {
      full = dense_product_(x, held.objects[0]);
      call.rows.full = reinterpret_cast<const void*>(address_of(full.ptr()));
    }
    call.rows.x = reinterpret_cast<const void*>(address_of(x.ptr()));
    call.rows.y = reinterpret_cast<void*>(address_of(y.ptr()));
    call.rows.bias = held.address(1);
    call.rows.gate_bias = held.address(5);
    call.rows.threads = threads;
    {
      nb::gil_scoped_release released;
      kernels_->convolution_forward(call);
    }
    static const nb::object* channels_first = new nb::object(nb::make_tuple(0, 3, 1, 2));
    PyObject* order[] = {y.ptr(), channels_first->ptr()};
    y = checked(PyObject_VectorcallMethod(names().permute, order, 2, nullptr));
    return selection ? nb::make_tuple(y, selected) : y;
  }

 private:
  nb::object x_shape_, x_strides_, dtype_, y_shape_, selected_shape_, packed_light_, packed_weight_, dense_product_;
  const Kernels* kernels_;
  Parameters parameters_;
  ConvolutionForward call_;
};

}  // namespace

void bind_prepared(nb::module_& m) {
  nb::set_leak_warnings(false);  // calls are kept in a dict of a Python module until the interpreter is gone
  nb::class_<PreparedLinear>(m, "PreparedLinear")
      .def(nb::init<nb::dict, nb::dict, nb::object, bool, int64_t, int64_t, int64_t, int64_t, int64_t, float, bool,
                    nb::object, nb::object, nb::object>(),
           "parameters"_a, "states"_a, "dtype"_a, "bfloat16"_a, "depth"_a, "neurons"_a, "rank"_a, "groups"_a,
           "selected_groups"_a, "threshold"_a, "hard"_a, "packed_light"_a.none(), "packed_weight"_a.none(), "dense_product"_a.none())
      .def("run", &PreparedLinear::run, "x"_a, "parameters"_a, "threads"_a, "selection"_a = false);
  nb::class_<PreparedConvolution>(m, "PreparedConvolution")
      .def(nb::init<nb::dict, nb::dict, nb::object, bool, nb::object, nb::object, const std::array<int64_t, 17>&, int64_t, int64_t,
                    int64_t, int64_t, int64_t, float, int64_t, int64_t, bool, nb::object, nb::object, nb::object>(),
           "parameters"_a, "states"_a, "x"_a, "bfloat16"_a, "y_shape"_a, "selected_shape"_a, "images"_a, "rows"_a, "neurons"_a, "rank"_a, "groups"_a,
           "selected_groups"_a, "threshold"_a, "positions"_a, "span"_a, "hard"_a, "packed_light"_a,
           "packed_weight"_a.none(), "dense_product"_a.none())
      .def("run", &PreparedConvolution::run, "x"_a, "parameters"_a, "threads"_a, "selection"_a = false);
}

}  // namespace midl
