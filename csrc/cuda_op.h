// SPDX-License-Identifier: Apache-2.0
//
// The torch side of a .cu file: the device and stream of an op, and its registration.
//
//   OnDevice on(x);                      // x's device is current until `on` goes; launches take on.stream
//   FLA_OPS_CUDA_IMPL(m) { m.impl("causal_conv1d_step", TORCH_BOX(&step)); }
//
// The ops register as fla_ops::* for CUDA; with -DFLA_SIMT as fla_ops_simt::* for the CPU.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.h"
#include "torch_view.h"

#if defined(FLA_SIMT)

#ifndef FLA_SIMT_NAMESPACE
#define FLA_SIMT_NAMESPACE fla_ops_simt
#endif
#define FLA_OPS_CUDA_IMPL(m) FLA_OPS_IMPL_IN(FLA_SIMT_NAMESPACE, CPU, m)

namespace fla_ops {

struct OnDevice {
  Stream stream;
  explicit OnDevice(const torch::stable::Tensor&) {}
};

}  // namespace fla_ops

#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define FLA_OPS_CUDA_IMPL(m) FLA_OPS_IMPL_IN(fla_ops, CUDA, m)

namespace fla_ops {

class OnDevice {
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  Stream stream;

  explicit OnDevice(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<Stream>(current);
  }
};

}  // namespace fla_ops

#endif

// One more step, so that the namespace is replaced by its value.
#define FLA_OPS_IMPL_IN(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
