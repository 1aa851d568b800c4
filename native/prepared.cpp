// The classes PreparedLinear, PreparedConvolution and PreparedFfn: small layers are over in microseconds, and so must be what surrounds their kernel.
//
// It holds addresses and sizes, checks in a few attribute reads that the parameters are the ones it was made for, in the
// state it was made for, and that the input is of its kind; what does not pass is left to the general path.
#include "prepared.hpp"

#include <nanobind/stl/array.h>


#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <vector>

#include "cpu.hpp"
#include "view.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using std::int64_t;

namespace midl {

std::uint64_t sample(std::uintptr_t data, int64_t bytes) {
  // 64 words at places without a period: masks of elements, rows or columns are seen. What costs is not a word but the page it
  // lies in, whose place in memory has to be looked up, so of a large tensor four words share one.
  constexpr int64_t kWords = 64, kTogether = 4, kPage = 1024;  // in words
  const auto* base = reinterpret_cast<const char*>(data);
  const int64_t words = bytes / 4, last = words - 1, together = words < kWords * kPage ? 1 : kTogether;
  const int64_t step = words / (kWords / together) < 1 ? 1 : words / (kWords / together);
  std::uint64_t hash = 14695981039346656037u;
  std::uint32_t random = 0;  // the first word is one of them
  const auto below = [&random](int64_t limit) {
    const auto at = int64_t(std::uint64_t(random) * std::uint64_t(limit) >> 32);
    random = random * 1664525u + 1013904223u;
    return at;
  };
  for (int64_t i = 0; i < words; i += step) {
    int64_t at = i + below(step);
    const int64_t page = at - int64_t((data / 4 + std::uintptr_t(at)) % kPage);
    for (int64_t j = 0; j < together; ++j, at = page + below(kPage)) {
      std::uint32_t word;
      std::memcpy(&word, base + 4 * (at < 0 ? 0 : at > last ? last : at), 4);
      hash = (hash ^ word) * 1099511628211u;
    }
  }
  return hash;
}

namespace {

struct Names {
  nb::object version = interned("_version"), permute = interned("permute"), dtype = interned("dtype"), new_empty = interned("new_empty"),
             dtype_keyword = checked(PyTuple_Pack(1, dtype.ptr()));
};
const Names& names() {
  static const Names* all = new Names;  // until the interpreter is gone
  return *all;
}

nb::object attribute(PyObject* object, const nb::object& name) { return checked(PyObject_GetAttr(object, name.ptr())); }
nb::object method(PyObject* object, const nb::object& name) { return checked(PyObject_CallMethodNoArgs(object, name.ptr())); }

// The address of a tensor that kernels can read or write.
const void* address_of(PyObject* tensor) {
  View view;
  if (!view.read(tensor)) throw nb::value_error("a tensor without memory");
  return view.data;
}

// What torch says of the state of the calling thread, asked by functions that were looked up once.
class Torch {
 public:
  static const Torch& state() {
    static const Torch* state = new Torch;  // until the interpreter is gone
    return *state;
  }

  // midl.ops.dispatch.is_plain_inference on the CPU, but for compilation and the weight, and without autocast; `view` becomes
  // x's. Compilers of Python must have been asked for before: they cannot look in here.
  bool infers_plainly(PyObject* x, View& view) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(x)) == tensor_.ptr() && says(is_grad_enabled_, Py_False) &&
           checked(PyObject_CallOneArg(is_autocast_enabled_.ptr(), cpu_.ptr())).ptr() == Py_False &&
           says(transforms_, Py_None) && nb::cast<int64_t>(call(dispatch_stack_)) == 0 && says(tracing_, Py_None) &&
           attribute(profiler_.ptr(), is_profiler_enabled_).ptr() == Py_False &&
           method(x, is_neg_).ptr() == Py_False && view.read(x) && view.on_cpu;
  }
  int threads() const { return nb::cast<int>(call(num_threads_)); }

 private:
  static nb::object call(const nb::object& function) { return checked(PyObject_CallNoArgs(function.ptr())); }
  static bool says(const nb::object& function, PyObject* answer) { return call(function).ptr() == answer; }

  nb::object torch_ = nb::module_::import_("torch"), c_ = torch_.attr("_C"), functorch_ = c_.attr("_functorch"),
             profiler_ = nb::module_::import_("torch.autograd.profiler"), tensor_ = torch_.attr("Tensor"),
             is_grad_enabled_ = torch_.attr("is_grad_enabled"), is_autocast_enabled_ = torch_.attr("is_autocast_enabled"),
             num_threads_ = torch_.attr("get_num_threads"), dispatch_stack_ = c_.attr("_len_torch_dispatch_stack"),
             tracing_ = c_.attr("_get_tracing_state"), transforms_ = functorch_.attr("peek_interpreter_stack"),
             cpu_ = interned("cpu"), is_neg_ = interned("is_neg"), is_profiler_enabled_ = interned("_is_profiler_enabled");
};

// The layout of a tensor that a call was prepared for.
struct Form {
  std::vector<int64_t> shape, strides;
  Element element = Element::other;
  bool on_cpu = false;

  Form() = default;
  explicit Form(const View& v)
      : shape(v.shape, v.shape + v.axes), strides(v.strides, v.strides + v.axes), element(v.element), on_cpu(v.on_cpu) {}
  bool fits(const View& v) const {
    return v.axes == int(shape.size()) && v.element == element && v.on_cpu == on_cpu &&
           std::equal(shape.begin(), shape.end(), v.shape) && std::equal(strides.begin(), strides.end(), v.strides);
  }
};

// One of the layer's parameters as it was when the call was prepared.
struct Parameter {
  nb::object name, reference;  // key in the module's dict; weak reference, or None where the layer has no such parameter
  Form form;
  const void* address = nullptr;
  int64_t version = 0, bytes = 0;
  std::uint64_t values = 0;
  std::size_t index = 0;
  bool copied = false;  // into panels, so that its values count; others are read at every call

  // Whether the call may take `now` for it; `at` becomes the address to read.
  bool fits(PyObject* now, const void*& at) const {
    at = nullptr;
    if (reference.is_none() || now == Py_None) return reference.is_none() && now == Py_None;
    View view;
    if (!view.read(now) || !form.fits(view)) return false;
    at = view.data;
    // A compiled graph makes the smallest parameters anew in every call. For copied ones, identity by weak reference: a mere
    // address may be used again.
    return !copied || (at == address && checked(PyObject_CallNoArgs(reference.ptr())).ptr() == now &&
                       nb::cast<int64_t>(attribute(now, names().version)) == version &&
                       sample(reinterpret_cast<std::uintptr_t>(address), bytes) == values);
  }
};

constexpr std::size_t kMostParameters = 12;
using ParameterNames = std::vector<const char*>;
const ParameterNames kLayerNames{"weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias"};
const ParameterNames kFfnNames{"weight",     "bias",     "value_weight", "value_bias", "down_weight", "down_bias",
                               "light_down", "light_up", "light_hidden", "light_bias", "gate_weight", "gate_bias"};

// The parameters of a layer as they were when a call was prepared, in the order of their names.
class Parameters {
 public:
  // `states` holds (version, address, sample) of those that panels copy, by name. What `parameters` lacks exists as panels
  // alone, whose address stands for its own.
  Parameters(const ParameterNames& names, nb::dict parameters, nb::dict states, const void* panels) {
    for (std::size_t i = 0; i < names.size(); ++i) {
      nb::object name = interned(names[i]);
      if (!parameters.contains(name)) {
        addresses_[i] = panels;
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
      View view;
      if (!view.read(tensor.ptr())) throw nb::value_error("a parameter without memory");
      p.form = Form(view);
      p.address = view.data;
      if (states.contains(p.name)) {
        // As read when the panels were made, not now: another thread may have changed the parameter since.
        nb::tuple state = nb::cast<nb::tuple>(states[p.name]);
        p.copied = true;
        p.version = nb::cast<int64_t>(state[0]);
        p.address = reinterpret_cast<const void*>(nb::cast<std::uintptr_t>(state[1]));
        p.values = nb::cast<std::uint64_t>(state[2]);
        p.bytes = nb::cast<int64_t>(tensor.attr("nbytes"));
      }
      addresses_[i] = p.address;
    }
  }

  // Those of one call, kept alive: other threads may drop them.
  struct Held {
    std::array<nb::object, kMostParameters> objects;
    std::array<const void*, kMostParameters> addresses;
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
  const void* address(std::size_t i) const { return addresses_[i]; }

 private:
  std::array<const void*, kMostParameters> addresses_{};
  std::vector<Parameter> present_;
};

const void* panels_at(const nb::object& t) { return t.is_none() ? nullptr : address_of(t.ptr()); }

// An output for x. Of what malloc would map every time (see midl.ops.huge_pages) Python takes care.
nb::object new_output(PyObject* x, PyObject* shape, int64_t elements, Storage storage) {
  constexpr int64_t kAlwaysMapped = 32 << 20;
  if (elements * (storage == Storage::bfloat16 ? 2 : 4) >= kAlwaysMapped)
    return nb::module_::import_("midl.ops.huge_pages").attr("empty_where_mapped")(nb::handle(shape), attribute(x, names().dtype));
  PyObject* arguments[] = {x, shape};
  return checked(PyObject_VectorcallMethod(names().new_empty.ptr(), arguments, 2, nullptr));
}

// Where the selection goes.
nb::object new_selection(PyObject* x, PyObject* shape) {
  static const nb::object* int32 = new nb::object(nb::module_::import_("torch").attr("int32"));
  PyObject* arguments[] = {x, shape, int32->ptr()};
  return checked(PyObject_VectorcallMethod(names().new_empty.ptr(), arguments, 2, names().dtype_keyword.ptr()));
}

int64_t leading_size(const View& x) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < x.axes; ++i) rows *= x.shape[i];
  return rows;
}

// The shape of x but for its last axis.
nb::object shape_with_last(const View& x, int64_t last) {
  nb::object shape = checked(PyTuple_New(x.axes));
  for (int i = 0; i < x.axes; ++i)
    PyTuple_SET_ITEM(shape.ptr(), i, checked(PyLong_FromLongLong(i + 1 == x.axes ? last : x.shape[i])).release().ptr());
  return shape;
}

class PreparedLinear {
 public:
  PreparedLinear(nb::dict parameters, nb::dict states, bool bfloat16, int64_t depth, int64_t neurons,
                 int64_t rank, int64_t groups, int64_t selected_groups, float threshold, bool hard,
                 nb::object packed_light, nb::object packed_weight, nb::object dense_product)
      : element_(bfloat16 ? Element::bfloat16 : Element::float32), packed_light_(std::move(packed_light)), packed_weight_(std::move(packed_weight)),
        dense_product_(std::move(dense_product)), kernels_(&current()), parameters_(kLayerNames, parameters, states, panels_at(packed_light_)) {
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
  nb::object run(nb::handle x, nb::dict parameters, int threads, bool selection, bool relu) const {
    View view;
    return view.read(x.ptr()) ? run_on(view, x, parameters, threads, selection, relu) : nb::none();
  }

  // y, by torch's number of threads; None also where the call is no plain inference.
  nb::object run_plainly(nb::handle x, nb::dict parameters, bool relu) const {
    const Torch& torch = Torch::state();
    View view;
    return torch.infers_plainly(x.ptr(), view) ? run_on(view, x, parameters, torch.threads(), false, relu) : nb::none();
  }

 private:
  nb::object run_on(const View& view, nb::handle x, nb::dict parameters, int threads, bool selection, bool relu) const {
    Parameters::Held held;
    if (&current() != kernels_ || !parameters_.fit(parameters, held)) return nb::none();
    LinearForward call = call_;
    if (view.element != element_ || !view.on_cpu || view.axes == 0 || view.shape[view.axes - 1] != call.depth ||
        !view.is_contiguous())
      return nb::none();
    call.rows = leading_size(view);
    nb::object y_shape = shape_with_last(view, call.neurons);
    nb::object y = new_output(x.ptr(), y_shape.ptr(), call.rows * call.neurons, call.storage);
    nb::object selected;
    if (selection) {
      selected = new_selection(x.ptr(), shape_with_last(view, call.selected_groups).ptr());
      call.selected = static_cast<std::int32_t*>(const_cast<void*>(address_of(selected.ptr())));
    }
    nb::object full;
    if (!dense_product_.is_none()) {
      full = dense_product_(x, held.objects[0]);
      call.full = address_of(full.ptr());
    }
    call.x = view.data;
    call.y = const_cast<void*>(address_of(y.ptr()));
    call.positions = call.rows;
    call.bias = held.addresses[1];
    call.gate_bias = held.addresses[5];
    call.threads = threads;
    call.relu = relu;
    {
      nb::gil_scoped_release released;
      kernels_->linear_forward(call);
    }
    return selection ? nb::make_tuple(y, selected) : y;
  }

  Element element_;
  nb::object packed_light_, packed_weight_, dense_product_;
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
      : y_shape_(std::move(y_shape)),
        selected_shape_(std::move(selected_shape)), packed_light_(std::move(packed_light)), packed_weight_(std::move(packed_weight)),
        dense_product_(std::move(dense_product)), kernels_(&current()), parameters_(kLayerNames, parameters, states, panels_at(packed_light_)) {
    static_assert(sizeof(Images) == sizeof images);
    View view;
    if (!view.read(x.ptr())) throw nb::value_error("images without memory");
    form_ = Form(view);
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
  nb::object run(nb::handle x, nb::dict parameters, int threads, bool selection, bool relu) const {
    View view;
    Parameters::Held held;
    if (&current() != kernels_ || !view.read(x.ptr()) || !form_.fits(view) || !parameters_.fit(parameters, held)) return nb::none();
    nb::object y = new_output(x.ptr(), y_shape_.ptr(), call_.rows.rows * call_.rows.neurons, call_.storage);
    ConvolutionForward call = call_;
    nb::object selected;
    if (selection) {
      selected = new_selection(x.ptr(), selected_shape_.ptr());
      call.rows.selected = static_cast<std::int32_t*>(const_cast<void*>(address_of(selected.ptr())));
    }
    nb::object full;  // (B, n, H, W), channels last
    if (!dense_product_.is_none()) {
      full = dense_product_(x, held.objects[0]);
      call.rows.full = address_of(full.ptr());
    }
    call.rows.x = view.data;
    call.rows.y = const_cast<void*>(address_of(y.ptr()));
    call.rows.bias = held.addresses[1];
    call.rows.gate_bias = held.addresses[5];
    call.rows.threads = threads;
    call.rows.relu = relu;
    {
      nb::gil_scoped_release released;
      kernels_->convolution_forward(call);
    }
    static const nb::object* channels_first = new nb::object(nb::make_tuple(0, 3, 1, 2));
    PyObject* order[] = {y.ptr(), channels_first->ptr()};
    y = checked(PyObject_VectorcallMethod(names().permute.ptr(), order, 2, nullptr));
    return selection ? nb::make_tuple(y, selected) : y;
  }

 private:
  Form form_;
  nb::object y_shape_, selected_shape_, packed_light_, packed_weight_, dense_product_;
  const Kernels* kernels_;
  Parameters parameters_;
  ConvolutionForward call_;
};

// The same for an FFN.
class PreparedFfn {
 public:
  PreparedFfn(nb::dict parameters, nb::dict states, bool bfloat16, int64_t depth, int64_t hidden, int64_t outputs, int64_t rank, int64_t groups,
              int64_t selected_groups, float threshold, bool hard, int activation, nb::object panels)
      : panels_(std::move(panels)), kernels_(&current()), parameters_(kFfnNames, parameters, states, panels_at(panels_)),
        element_(bfloat16 ? Element::bfloat16 : Element::float32) {
    call_ = {.storage = bfloat16 ? Storage::bfloat16 : Storage::float32, .x_stride = depth, .depth = depth, .hidden = hidden, .outputs = outputs, .rank = rank, .groups = groups,
             .selected_groups = selected_groups, .threshold = threshold,
             .panels = address_of(panels_.ptr()), .hard = hard,
             .activation = Activation(activation)};
  }

  // The same as PreparedLinear.
  nb::object run(nb::handle x, nb::dict parameters, int threads, bool selection) const {
    View view;
    Parameters::Held held;
    if (&current() != kernels_ || !view.read(x.ptr()) || view.element != element_ || !view.on_cpu || view.axes == 0 ||
        view.shape[view.axes - 1] != call_.depth || !view.is_contiguous() || !parameters_.fit(parameters, held))
      return nb::none();
    FfnForward call = call_;
    call.rows = leading_size(view);
    nb::object y = new_output(x.ptr(), shape_with_last(view, call.outputs).ptr(), call.rows * call.outputs, call.storage);
    nb::object selected;
    if (selection) {
      selected = new_selection(x.ptr(), shape_with_last(view, call.selected_groups).ptr());
      call.selected = static_cast<std::int32_t*>(const_cast<void*>(address_of(selected.ptr())));
    }
    call.x = view.data;
    call.y = const_cast<void*>(address_of(y.ptr()));
    // In the order of kFfnNames.
    const void** const fields[] = {&call.weight,     &call.bias,     &call.value_weight, &call.value_bias, &call.down_weight, &call.down_bias,
                                    &call.light_down, &call.light_up, &call.light_hidden, &call.light_bias, &call.gate_weight, &call.gate_bias};
    for (std::size_t i = 0; i < std::size(fields); ++i) *fields[i] = held.addresses[i];
    call.threads = threads;
    {
      nb::gil_scoped_release released;
      kernels_->ffn_forward(call);
    }
    return selection ? nb::make_tuple(y, selected) : y;
  }

 private:
  nb::object panels_;
  const Kernels* kernels_;
  Parameters parameters_;
  Element element_;
  FfnForward call_{};
};

}  // namespace

void bind_prepared(nb::module_& m) {
  nb::set_leak_warnings(false);  // calls are kept in a dict of a Python module until the interpreter is gone
  m.def("infers_plainly", [](nb::handle x) {
    View view;
    return Torch::state().infers_plainly(x.ptr(), view);
  }, "x"_a.none());
  nb::class_<PreparedLinear>(m, "PreparedLinear")
      .def(nb::init<nb::dict, nb::dict, bool, int64_t, int64_t, int64_t, int64_t, int64_t, float, bool,
                    nb::object, nb::object, nb::object>(),
           "parameters"_a, "states"_a, "bfloat16"_a, "depth"_a, "neurons"_a, "rank"_a, "groups"_a,
           "selected_groups"_a, "threshold"_a, "hard"_a, "packed_light"_a.none(), "packed_weight"_a.none(), "dense_product"_a.none())
      .def("run", &PreparedLinear::run, "x"_a, "parameters"_a, "threads"_a, "selection"_a = false, "relu"_a = false)
      .def("run_plainly", &PreparedLinear::run_plainly, "x"_a.none(), "parameters"_a, "relu"_a = false);
  nb::class_<PreparedFfn>(m, "PreparedFfn")
      .def(nb::init<nb::dict, nb::dict, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, bool, int, nb::object>(),
           "parameters"_a, "states"_a, "bfloat16"_a, "depth"_a, "hidden"_a, "outputs"_a, "rank"_a, "groups"_a, "selected_groups"_a,
           "threshold"_a, "hard"_a, "activation"_a, "panels"_a)
      .def("run", &PreparedFfn::run, "x"_a, "parameters"_a, "threads"_a, "selection"_a = false);
  nb::class_<PreparedConvolution>(m, "PreparedConvolution")
      .def(nb::init<nb::dict, nb::dict, nb::object, bool, nb::object, nb::object, const std::array<int64_t, 17>&, int64_t, int64_t,
                    int64_t, int64_t, int64_t, float, int64_t, int64_t, bool, nb::object, nb::object, nb::object>(),
           "parameters"_a, "states"_a, "x"_a, "bfloat16"_a, "y_shape"_a, "selected_shape"_a, "images"_a, "rows"_a, "neurons"_a, "rank"_a, "groups"_a,
           "selected_groups"_a, "threshold"_a, "positions"_a, "span"_a, "hard"_a, "packed_light"_a,
           "packed_weight"_a.none(), "dense_product"_a.none())
      .def("run", &PreparedConvolution::run, "x"_a, "parameters"_a, "threads"_a, "selection"_a = false, "relu"_a = false);
}

}  // namespace midl
