// csrc/multi_lora.cuh on the emulated machine, as a C function for tests/test_cuda_multi_lora.py.
#include "multi_lora.cuh"

#include <cstdio>

namespace {

/// What the kernel ahead in the stream does, as late as it may: copies `bytes` from `from` to `to`.
struct Ahead {
  void* to;
  const void* from;
  int64_t bytes;
};

template <class T, int RB>
void run(const multi_lora::Params& p, int path) {
  using namespace multi_lora;
  const uint32_t grid = p.items * BLOCKS;
  const int in = shrink_bytes(p.columns, RB), out = expand_bytes(p.columns);
  if (path == CLUSTER) {
    emulator::run_grid(multi_lora_cluster<T, RB>, {grid}, BLOCKS, THREADS, in + out, p);
  } else {
    emulator::run_grid(multi_lora_shrink<T, RB>, {grid}, 1, THREADS, in, p);
    emulator::run_grid(multi_lora_expand<T>, {grid}, 1, THREADS, out, p);
  }
}

template <class T>
void run_ranks(const multi_lora::Params& p, int path) {
  if (p.columns <= 16) return run<T, 1>(p, path);
  if (p.columns <= 32) return run<T, 2>(p, path);
  return run<T, 4>(p, path);
}

}  // namespace

/// As fastpeft_multi_lora; `seed` orders threads and copies. 0, or 1 with what went wrong in `fault` [256].
extern "C" int emulated_multi_lora(const multi_lora::Params* given, int dtype, int path, const Ahead* ahead, int count,
                                   uint64_t seed, char* fault) {
  multi_lora::Params p = *given;
  emulator::settings.seed = seed;
  emulator::settings.resident = 1;  // more than one cluster at a time would only take memory
  emulator::settings.kernel_ahead = [=] {
    for (int i = 0; i < count; ++i) memcpy(ahead[i].to, ahead[i].from, ahead[i].bytes);
  };
  if (const char* wrong = multi_lora::complete(&p, path)) return snprintf(fault, 256, "%s", wrong), 1;
  try {
    dtype ? run_ranks<__half>(p, path) : run_ranks<__nv_bfloat16>(p, path);
  } catch (const emulator::Fault& found) {
    return snprintf(fault, 256, "%s", found.what()), 1;
  }
  return 0;
}
