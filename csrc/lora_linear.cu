// Launchers of lora_linear.cuh: checks, tensor maps, the size of the grid.
#include <atomic>

#include "common.cuh"
#include "lora_linear.cuh"
#include "lora_linear.h"
#include "tensor_map.cuh"

namespace lora_linear {
namespace {

using fastpeft::BAD_ARGUMENT;
using fastpeft::fail;
using fastpeft::OK;

/// A matrix in memory: rows are contiguous and begin `stride` elements apart.
struct Matrix {
  const char* name;
  const void* data;
  int64_t rows, columns, stride;
};

/// What TMA demands of a matrix.
int check(const Matrix& m) {
  if (m.stride < m.columns) {
    return fail(BAD_ARGUMENT, "lora_linear: %s has a row stride of %lld, expected at least %lld", m.name,
                static_cast<long long>(m.stride), static_cast<long long>(m.columns));
  }
  if (m.stride % 8 || reinterpret_cast<uintptr_t>(m.data) % 16) {
    return fail(BAD_ARGUMENT, "lora_linear: %s has rows that begin between multiples of 16 bytes (stride %lld)", m.name,
                static_cast<long long>(m.stride));
  }
  return OK;
}

int check_sizes(int64_t M, int64_t N, int64_t K, int64_t R, int64_t contraction, int64_t max_rank) {
  constexpr int64_t LIMIT = 1 << 30;  // the kernel's coordinates are int, as TMA's are
  if (M < 0 || N < 0 || K < 0 || M > LIMIT || N > LIMIT || K > LIMIT) {
    return fail(BAD_ARGUMENT, "lora_linear: M=%lld, N=%lld, K=%lld, expected 0 to 2^30", static_cast<long long>(M),
                static_cast<long long>(N), static_cast<long long>(K));
  }
  if (contraction < 8 || contraction % 8) {
    return fail(BAD_ARGUMENT, "lora_linear: sums over %lld columns, expected a multiple of 8",
                static_cast<long long>(contraction));
  }
  if (R < 0 || R > max_rank) {
    return fail(BAD_ARGUMENT, "lora_linear: rank %lld, expected at most %lld", static_cast<long long>(R),
                static_cast<long long>(max_rank));
  }
  return OK;
}

/// How many clusters each device holds at a time; asked once, kept for each kernel.
using Clusters = std::atomic<int>[64];

template <class... Parameters>
int active_clusters(void (*kernel)(Parameters...), int shared, Clusters& known, int* clusters) {
  int device = 0;
  if (int failed = fastpeft::check(cudaGetDevice(&device), "current device")) return failed;
  const bool kept = device < static_cast<int>(sizeof(known) / sizeof(known[0]));
  if (kept && known[device]) return *clusters = known[device], OK;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {CLUSTER, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(CLUSTER);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (int failed = fastpeft::check(allowed, "shared memory of lora_linear")) return failed;
  const auto counted = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  if (int failed = fastpeft::check(counted, "clusters of lora_linear")) return failed;
  if (*clusters < 1) return fail(fastpeft::NOT_RESIDENT, "lora_linear: no room on the device for two blocks at a time");
  if (kept) known[device] = *clusters;
  return OK;
}

/// The five matrices of  out = x w + s p  as the kernel sees them; s and p may have no columns.
template <class T, class Config, Form FORM, int DOWN_RANKS>
int launch(const Matrix& x, const Matrix& w, const Matrix& s, const Matrix& p, const Matrix& out, Params<T> params,
           void* stream) {
  constexpr int SHARED = shared_bytes<Config>;
  static_assert(SHARED <= 232448, "more than a block may have on sm_90");
  constexpr int W_COLUMNS = 64, W_ROWS = FORM == Form::FORWARD ? Config::BLOCK_N / 2 : 64;
  params.M = static_cast<int>(out.rows);
  params.N = static_cast<int>(out.columns);
  params.K = static_cast<int>(x.columns);
  params.R = static_cast<int>(s.columns);
  if (!params.M || !params.N) return OK;
  for (const Matrix* m : {&x, &w, &out}) {
    if (int failed = check(*m)) return failed;
  }
  const bool low_rank = params.R > 0;
  if (low_rank) {
    if (int failed = check(s)) return failed;
    if (int failed = check(p)) return failed;
  }
  Maps maps;
  struct Entry {
    CUtensorMap* map;
    const Matrix& matrix;
    int columns, rows;
  };
  const Entry entries[] = {{&maps.x, x, BLOCK_K, BLOCK_M},
                           {&maps.w, w, W_COLUMNS, W_ROWS},
                           {&maps.s, low_rank ? s : x, BLOCK_K, BLOCK_M},  // without a rank: a map that is never used
                           {&maps.p, low_rank ? p : w, W_COLUMNS, W_ROWS},
                           {&maps.out, out, 64, 64}};
  for (const Entry& e : entries) {
    const Matrix& m = e.matrix;
    if (int failed = fastpeft::tensor_map<T>(e.map, m.name, m.data, m.rows, m.columns, m.stride, e.rows, e.columns)) {
      return failed;
    }
  }
  auto* function = kernel<T, Config, FORM, DOWN_RANKS>;
  static Clusters known;
  int clusters = 0;
  if (int failed = active_clusters(function, SHARED, known, &clusters)) return failed;
  const Tiles tiles = Tiles::of<Config>(params);
  fastpeft::Launch how;
  how.grid = CLUSTER * tiles.clusters(clusters);
  how.threads = THREADS;
  how.shared = SHARED;
  how.cluster = CLUSTER;
  how.stream = static_cast<cudaStream_t>(stream);
  return fastpeft::launch(function, how, maps, params);
}

template <class T, Form FORM>
int launch_config(int config, const Matrix& x, const Matrix& w, const Matrix& s, const Matrix& p, const Matrix& out,
                  const Params<T>& params, void* stream) {
  if (config == 0) return launch<T, Wide, FORM, 0>(x, w, s, p, out, params, stream);
  if (config == 1) return launch<T, Narrow, FORM, 0>(x, w, s, p, out, params, stream);
  return fail(BAD_ARGUMENT, "lora_linear: config is %d, expected 0 or 1", config);
}

int check_mask(const int64_t* seed, uint32_t threshold) {
  if (threshold > 65535) return fail(BAD_ARGUMENT, "lora_linear: threshold is %u, expected at most 65535", threshold);
  if (threshold && !seed) return fail(BAD_ARGUMENT, "lora_linear: dropout without a seed");
  return OK;
}

}  // namespace
}  // namespace lora_linear

using namespace lora_linear;

extern "C" int fastpeft_lora_linear(const void* x, int64_t stride_x, const void* w, int64_t stride_w, const void* s,
                                    int64_t stride_s, const void* b, int64_t stride_b, const void* bias, void* y,
                                    int64_t stride_y, int64_t M, int64_t N, int64_t K, int64_t R, int dtype, int config,
                                    void* stream) {
  if (int failed = check_sizes(M, N, K, R, K, 256)) return failed;
  return fastpeft::with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Params<T> params = {};
    params.bias = static_cast<const T*>(bias);
    return launch_config<T, Form::FORWARD>(config, {"x", x, M, K, stride_x}, {"weight", w, N, K, stride_w},
                                           {"s", s, M, R, stride_s}, {"lora_b", b, N, R, stride_b},
                                           {"y", y, M, N, stride_y}, params, stream);
  });
}

extern "C" int fastpeft_lora_linear_backward(const void* dy, int64_t stride_dy, const void* w, int64_t stride_w,
                                             const void* ds, int64_t stride_ds, const void* a, int64_t stride_a,
                                             void* dx, int64_t stride_dx, int64_t M, int64_t N, int64_t K, int64_t R,
                                             const int64_t* seed, uint32_t threshold, float inverse_keep, int dtype,
                                             int config, void* stream) {
  if (int failed = check_sizes(M, N, K, R, N, 256)) return failed;
  if (int failed = check_mask(seed, threshold)) return failed;
  return fastpeft::with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Params<T> params = {};
    params.mask = {seed, threshold};
    params.inverse_keep = inverse_keep;
    return launch_config<T, Form::BACKWARD>(config, {"dy", dy, M, N, stride_dy}, {"weight", w, N, K, stride_w},
                                            {"ds", ds, M, R, stride_ds}, {"lora_a", a, R, K, stride_a},
                                            {"dx", dx, M, K, stride_dx}, params, stream);
  });
}

extern "C" int fastpeft_lora_linear_down(const void* x, int64_t stride_x, const void* w, int64_t stride_w,
                                         const void* a, int64_t stride_a, const void* b, int64_t stride_b,
                                         const void* bias, void* s, int64_t stride_s, void* y, int64_t stride_y,
                                         int64_t M, int64_t N, int64_t K, int64_t R, float scale, const int64_t* seed,
                                         uint32_t threshold, float inverse_keep, void* workspace, int dtype,
                                         void* stream) {
  if (int failed = check_sizes(M, N, K, R, K, 64)) return failed;
  if (int failed = check_mask(seed, threshold)) return failed;
  if (!R) return fail(BAD_ARGUMENT, "lora_linear: rank 0, expected at least 1");
  if (!workspace && M) return fail(BAD_ARGUMENT, "lora_linear: no workspace");
  const Matrix matrix_a = {"lora_a", a, R, K, stride_a};
  if (int failed = check(matrix_a)) return failed;
  return fastpeft::with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    Params<T> params = {};
    params.bias = static_cast<const T*>(bias);
    params.mask = {seed, threshold};
    params.inverse_keep = inverse_keep;
    params.x = static_cast<const T*>(x);
    params.a = static_cast<const T*>(a);
    params.s = static_cast<T*>(s);
    params.stride_x = stride_x;
    params.stride_a = stride_a;
    params.stride_s = stride_s;
    params.scale = scale;
    params.workspace = static_cast<uint32_t*>(workspace);
    const Matrix matrix_x = {"x", x, M, K, stride_x}, matrix_w = {"weight", w, N, K, stride_w};
    const Matrix matrix_s = {"s", s, M, R, stride_s}, matrix_b = {"lora_b", b, N, R, stride_b};
    const Matrix matrix_y = {"y", y, M, N, stride_y};
    auto* form = R <= 16 ? launch<T, Wide, Form::FORWARD, 16> : launch<T, Wide, Form::FORWARD, 64>;
    return form(matrix_x, matrix_w, matrix_s, matrix_b, matrix_y, params, stream);
  });
}

extern "C" int64_t fastpeft_lora_linear_workspace(int64_t M) { return 4 * workspace_words(M); }
