// A device for tests: tensors on it lie in the host's memory, but are no CPU tensors. numpy can't read
// them, an operation that mixes them with CPU tensors raises, and memory is counted, as on a GPU.
// What has no kernel here is computed on copies by the CPU, so that it gives the CPU's bits. Division by
// a number is not: as CUDA does, it multiplies by the reciprocal, which rounds twice.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

namespace {

constexpr auto kApart = c10::DeviceType::PrivateUse1;

std::atomic<int64_t> held{0}, peak{0};

struct Block {
  void* at;
  int64_t bytes;
};

void give_back(void* given) {
  const auto* block = static_cast<Block*>(given);
  held -= block->bytes;
  c10::free_cpu(block->at);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{c10::alloc_cpu(bytes), static_cast<int64_t>(bytes)};
    const int64_t now = held += block->bytes;
    for (int64_t most = peak; most < now && !peak.compare_exchange_weak(most, now);) {
    }
    return {block->at, block, &give_back, c10::Device(kApart, 0)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(kApart, &memory);

// One device with one stream, on which everything has happened already.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kApart; }
  c10::Device exchangeDevice(c10::Device) const override { return {kApart, 0}; }
  c10::Device getDevice() const override { return {kApart, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, {kApart, 0});
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream({kApart, 0}); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

at::Tensor on_host(const at::Tensor& tensor) {
  TORCH_CHECK(!tensor.is_neg() && !tensor.is_conj(), "negative and conjugate views: resolve them");
  if (tensor.device().type() != kApart) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {},
                       tensor.options().device(at::kCPU).requires_grad(false));
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) { return on_host(tensor).item(); }

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  std::optional<int64_t> at_offset;
  if (offset) at_offset = offset->guard_int(__FILE__, __LINE__);
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), at_offset);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size,
                         std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_to_all_of_storage(at::Tensor& self, at::Storage source) {
  const int64_t size = source.nbytes() / self.itemsize();
  return at::native::set_storage_cpu_(self, source, 0, {size}, {1});
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset,
                        c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset.guard_int(__FILE__, __LINE__),
                                      C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  TORCH_CHECK(weight.device() == input.device(), "a convolution on two devices");
  std::optional<at::Tensor> host_bias;
  if (bias && bias->defined()) host_bias = on_host(*bias);
  return at::convolution_symint(on_host(input), on_host(weight), host_bias, stride, padding,
                                dilation, transposed, output_padding, groups)
      .to(input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
    bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups,
    std::array<bool, 3> wanted) {
  TORCH_CHECK(weight.device() == input.device(), "a convolution on two devices");
  const std::vector<c10::SymInt> bias = {weight.sym_size(transposed ? 1 : 0) *
                                         (transposed ? groups : c10::SymInt(1))};
  auto found = at::convolution_backward_symint(
      on_host(grad), on_host(input), on_host(weight), c10::SymIntArrayRef(bias), stride, padding,
      dilation, transposed, output_padding, groups, wanted);
  auto there = [&](const at::Tensor& t) { return t.defined() ? t.to(input.device()) : t; };
  return {there(std::get<0>(found)), there(std::get<1>(found)), there(std::get<2>(found))};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage", set_to_all_of_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
}

void refuse_other_devices(const at::Tensor& tensor, const std::string& name) {
  TORCH_CHECK(!tensor.defined() || tensor.dim() == 0 || tensor.device().type() == kApart,
              "Expected all tensors to be on the same device in ", name, "; got ", tensor.device());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  for (const auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    if (value.isTensor()) {
      refuse_other_devices(value.toTensor(), name);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) refuse_other_devices(tensor, name);
    }  // lists of optional tensors are indices, which may be the CPU's
  }
  at::native::cpu_fallback(op, stack);
}

bool is_number(const at::Tensor& tensor) {
  return tensor.dim() == 0 && tensor.device().type() == at::kCPU;
}

at::Tensor& quotient_into(const at::Tensor& self, const at::Tensor& other, at::Tensor& out) {
  refuse_other_devices(other, "aten::div");
  at::Tensor quotient;
  if (is_number(other) && self.is_floating_point()) {
    quotient = on_host(self).mul(at::ones({}, self.options().device(at::kCPU)).div(other));
  } else {
    quotient = at::div(on_host(self), on_host(other));
  }
  if (!out.defined()) return out = quotient.to(c10::Device(kApart, 0));
  out.resize_(quotient.sizes());
  return out.copy_(quotient);
}

at::Tensor quotient_of(const at::Tensor& self, const at::Tensor& other) {
  at::Tensor out;
  return quotient_into(self, other, out);
}

at::Tensor& quotient_in_place(at::Tensor& self, const at::Tensor& other) {
  return quotient_into(self, other, self);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("div.Tensor", quotient_of);
  m.impl("div_.Tensor", quotient_in_place);
  m.impl("div.out", quotient_into);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY(apart, m) {
  m.def("memory_allocated() -> int", []() { return held.load(); });
  m.def("max_memory_allocated() -> int", []() { return peak.load(); });
  m.def("reset_peak_memory_stats() -> ()", []() { peak = held.load(); });
}

}  // namespace
