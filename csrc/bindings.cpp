// fastpeft._C: the launchers of csrc/ as functions of integers. Knows neither torch nor tensors.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.cuh"
#include "lora_linear.h"
#include "multi_lora.h"
#include "on_device.cuh"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

/// Throws where a launcher or the runtime refused.
void demand(int code) {
  if (code != fastpeft::OK) throw std::runtime_error(std::string("fastpeft._C: ") + fastpeft::error_text);
}

/// a, b, y, scales, ranks; strides of a, a's rows, b, b's rows, y's rows; R, N.
using SliceNumbers = std::array<int64_t, 12>;

multi_lora::Slice slice_of(const SliceNumbers& n) {
  multi_lora::Slice slice = {};
  slice.a = pointer<const void>(n[0]);
  slice.b = pointer<const void>(n[1]);
  slice.y = pointer<void>(n[2]);
  slice.scales = pointer<const float>(n[3]);
  slice.ranks = pointer<const int>(n[4]);
  slice.stride_as = n[5];
  slice.stride_ar = n[6];
  slice.stride_bs = n[7];
  slice.stride_bn = n[8];
  slice.stride_ym = n[9];
  slice.rank = static_cast<int>(n[10]);
  slice.width = static_cast<int>(n[11]);
  return slice;
}

void run_multi_lora(int64_t x, int64_t stride_xm, int k, int64_t order, int64_t starts, int64_t tiles,
                    int64_t stride_tiles, int tile_count, int tile, const std::vector<SliceNumbers>& slices, int64_t s,
                    int64_t stride_sm, int64_t planes, int dtype, int path, bool early, int device, int64_t stream) {
  if (slices.size() > multi_lora::MAX_SLICES) throw std::invalid_argument("multi_lora: expected 1 ... 4 slices");
  multi_lora::Params p = {};
  p.slice_count = static_cast<int>(slices.size());
  for (size_t i = 0; i < slices.size(); ++i) p.slices[i] = slice_of(slices[i]);
  p.x = pointer<const void>(x);
  p.order = pointer<const int>(order);
  p.starts = pointer<const int>(starts);
  p.tiles = pointer<const int>(tiles);
  p.s = pointer<float>(s);
  p.planes = pointer<float>(planes);
  p.stride_xm = stride_xm;
  p.stride_tiles = stride_tiles;
  p.stride_sm = stride_sm;
  p.k = k;
  p.tile = tile;
  p.tile_count = tile_count;
  const fastpeft::OnDevice on(device);
  demand(on.failed());
  demand(fastpeft_multi_lora(&p, dtype, path, early, pointer<void>(stream)));
}

void run_lora_linear(int64_t x, int64_t stride_x, int64_t w, int64_t stride_w, int64_t s, int64_t stride_s, int64_t b,
                     int64_t stride_b, int64_t bias, int64_t y, int64_t stride_y, int64_t M, int64_t N, int64_t K,
                     int64_t R, int dtype, int config, int device, int64_t stream) {
  const fastpeft::OnDevice on(device);
  demand(on.failed());
  demand(fastpeft_lora_linear(pointer<const void>(x), stride_x, pointer<const void>(w), stride_w,
                              pointer<const void>(s), stride_s, pointer<const void>(b), stride_b,
                              pointer<const void>(bias), pointer<void>(y), stride_y, M, N, K, R, dtype, config,
                              pointer<void>(stream)));
}

void run_lora_linear_backward(int64_t dy, int64_t stride_dy, int64_t w, int64_t stride_w, int64_t ds, int64_t stride_ds,
                              int64_t a, int64_t stride_a, int64_t dx, int64_t stride_dx, int64_t M, int64_t N,
                              int64_t K, int64_t R, int64_t seed, uint32_t threshold, float inverse_keep, int dtype,
                              int config, int device, int64_t stream) {
  const fastpeft::OnDevice on(device);
  demand(on.failed());
  demand(fastpeft_lora_linear_backward(pointer<const void>(dy), stride_dy, pointer<const void>(w), stride_w,
                                       pointer<const void>(ds), stride_ds, pointer<const void>(a), stride_a,
                                       pointer<void>(dx), stride_dx, M, N, K, R, pointer<const int64_t>(seed),
                                       threshold, inverse_keep, dtype, config, pointer<void>(stream)));
}

void run_lora_linear_down(int64_t x, int64_t stride_x, int64_t w, int64_t stride_w, int64_t a, int64_t stride_a,
                          int64_t b, int64_t stride_b, int64_t bias, int64_t s, int64_t stride_s, int64_t y,
                          int64_t stride_y, int64_t M, int64_t N, int64_t K, int64_t R, float scale, int64_t seed,
                          uint32_t threshold, float inverse_keep, int64_t workspace, int dtype, int device,
                          int64_t stream) {
  const fastpeft::OnDevice on(device);
  demand(on.failed());
  demand(fastpeft_lora_linear_down(pointer<const void>(x), stride_x, pointer<const void>(w), stride_w,
                                   pointer<const void>(a), stride_a, pointer<const void>(b), stride_b,
                                   pointer<const void>(bias), pointer<void>(s), stride_s, pointer<void>(y), stride_y, M,
                                   N, K, R, scale, pointer<const int64_t>(seed), threshold, inverse_keep,
                                   pointer<void>(workspace), dtype, pointer<void>(stream)));
}

/// (devices, why none can be used): the second is empty where all is well.
py::tuple devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return py::make_tuple(error == cudaSuccess ? count : 0, error == cudaSuccess ? "" : cudaGetErrorString(error));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA launchers of fastpeft: pointers, sizes and strides as integers";
  m.attr("cuda") = CUDART_VERSION;
  m.def("devices", &devices);
  m.def("lora_linear", &run_lora_linear);
  m.def("lora_linear_backward", &run_lora_linear_backward);
  m.def("lora_linear_down", &run_lora_linear_down);
  m.def("lora_linear_workspace", &fastpeft_lora_linear_workspace);
  m.def("multi_lora", &run_multi_lora);
}
