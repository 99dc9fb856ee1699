// Launcher of multi_lora.cuh: what it may be given, and which kernels run.
//
// Reading ahead (`early`). The cluster kernel fetches the routing, the ranks and the adapters' weights before it waits
// for the kernels ahead of it, and only then touches x, y and the scales. With `early` it may start while the kernel
// ahead still runs, so whatever wrote routing, ranks or weights must be over by then: at least one kernel that was
// launched in the ordinary way (the base's GEMM, say) must lie between that writer and this launch, and the kernel
// ahead must not itself be an early one that the writer directly precedes. Otherwise what is read may be stale. Off
// unless asked for.
#include "common.cuh"
#include "multi_lora.cuh"
#include "multi_lora.h"

namespace multi_lora {

using fastpeft::BAD_ARGUMENT;
using fastpeft::fail;

// What a block may have: 227 KiB on sm_90 and sm_100, 99 on sm_120, where config() takes clusters up to 384 columns.
static_assert(shrink_bytes(MAX_COLUMNS, 2) + expand_bytes(MAX_COLUMNS) <= 232448);
static_assert(shrink_bytes(384, 2) + expand_bytes(384) <= 101376);
static_assert(shrink_bytes(MAX_COLUMNS, 2) <= 101376 && expand_bytes(MAX_COLUMNS) <= 101376);

template <class T, int RB>
int launch_ranks(const Params& p, int path, bool early, cudaStream_t stream) {
  const int grid = p.items * BLOCKS, in = shrink_bytes(p.columns, RB), out = expand_bytes(p.columns);
  if (path == CLUSTER) {
    return fastpeft::launch(multi_lora_cluster<T, RB>, {grid, THREADS, in + out, BLOCKS, early, stream}, p);
  }
  const fastpeft::Launch first = {grid, THREADS, in, 1, false, stream}, second = {grid, THREADS, out, 1, false, stream};
  if (int failed = fastpeft::launch(multi_lora_shrink<T, RB>, first, p)) return failed;
  return fastpeft::launch(multi_lora_expand<T>, second, p);
}

}  // namespace multi_lora

extern "C" int fastpeft_multi_lora(const multi_lora::Params* given, int dtype, int path, int early, void* stream) {
  using namespace multi_lora;
  Params p = *given;
  if (const char* wrong = complete(&p, path)) return fail(BAD_ARGUMENT, "multi_lora: %s", wrong);
  if (p.items == 0 || p.columns == 0) return fastpeft::OK;
  return fastpeft::with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto s = static_cast<cudaStream_t>(stream);
    if (p.columns <= 16) return launch_ranks<T, 1>(p, path, early, s);
    return launch_ranks<T, 2>(p, path, early, s);
  });
}
