// The emulator itself: a small grid that uses each kind of operation once, and programs that must be found at fault.
#include <cstdio>

#include "on_device.cuh"
#include "ptx.cuh"

using bf16 = __nv_bfloat16;

__global__ void sum_over_cluster(const float* in, float* out, uint32_t* done) {
  float* mine = reinterpret_cast<float*>(ptx::dynamic_shared());
  uint64_t* barrier = reinterpret_cast<uint64_t*>(mine + 64);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_fence_init();
    ptx::mbarrier_arrive_expect(barrier, 256);
    ptx::bulk_load(mine, in + blockIdx.x * 64, 256, barrier);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  ptx::cluster_sync();
  float sum = 0;
  for (int rank = 0; rank < 2; ++rank) sum += ptx::cluster_map(mine, rank)[threadIdx.x];
  ptx::cluster_sync();
  for (int lane = 16; lane; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
  if (threadIdx.x % 32 == 0) out[blockIdx.x * 2 + threadIdx.x / 32] = sum;
  if (threadIdx.x == 0) ptx::add_release(done, 1);
}

__global__ void identity(float* out) {  // a [16, 16] of 1 + row, times the unit matrix's first 8 columns
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float c[4] = {};
  const uint32_t low = ptx::pack<bf16>(1.f + g, 1.f + g), high = ptx::pack<bf16>(9.f + g, 9.f + g);
  const uint32_t unit = ptx::pack<bf16>(g == 2 * t, g == 2 * t + 1);
  ptx::mma_m16n8k16<bf16>(c, low, high, low, high, unit, 0);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

__global__ void hang() {
  uint64_t* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 2);
  __syncthreads();
  if (threadIdx.x == 0) ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_wait(barrier, 0);
}

__global__ void arrive_twice() {
  uint64_t* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 2);
    ptx::mbarrier_arrive_expect(barrier, 16);
    ptx::mbarrier_arrive(barrier);
    ptx::mbarrier_arrive(barrier);
  }
}

__global__ void poll(uint32_t* flag) {
  while (!ptx::load_acquire(flag)) {
  }
}

__global__ void starve() { ptx::registers_increase<232>(); }  // nobody gives any back

__global__ void one_lane_aligned() {
  if (threadIdx.x == 0) ptx::wgmma_fence();
}

__global__ void one_lane_waits() {
  uint64_t* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_arrive(barrier);
    ptx::mbarrier_wait(barrier, 0);
  }
  ptx::cluster_sync();
}

__global__ void copy_over_a_store(const float* in) {
  uint64_t* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  if (threadIdx.x) return;
  ptx::mbarrier_init(barrier, 1);
  ptx::mbarrier_fence_init();
  ptx::store_shared_16(barrier + 2, uint4{});
  ptx::mbarrier_arrive_expect(barrier, 16);
  ptx::bulk_load(barrier + 2, in, 16, barrier);
}

template <class... Args>
static bool fails(const char* with, Args... args) {
  try {
    emulator::run_grid(args...);
  } catch (const emulator::Fault& fault) {
    if (std::string(fault.what()).find(with) != std::string::npos) return true;
    printf("expected %s, found %s\n", with, fault.what());
  }
  return false;
}

/// A launch on device 1 by a thread without a context leaves it without one, and device 0 too.
static bool leaves_no_context_behind() {
  {
    const fastpeft::OnDevice on(1);
    if (on.failed() || emulator::context != 2) return false;
  }
  return emulator::context == 0 && emulator::contexts == std::set<uintptr_t>{2};
}

int main() {
  alignas(16) float in[256], out[128];
  uint32_t done = 0, zero = 0;
  bool ok = true;
  for (int i = 0; i < 256; ++i) in[i] = i;
  emulator::run_grid(sum_over_cluster, {4}, 2, 64, 512, in, out, &done);
  for (int block = 0; block < 4; ++block) {
    for (int warp = 0; warp < 2; ++warp) {
      float expected = 0;
      for (int rank = 0; rank < 2; ++rank)
        for (int lane = 0; lane < 32; ++lane) expected += in[(block / 2 * 2 + rank) * 64 + warp * 32 + lane];
      ok &= out[block * 2 + warp] == expected;
    }
  }
  ok &= done == 4;
  emulator::run_grid(identity, {1}, 1, 32, 0, out);
  for (int i = 0; i < 128; ++i) ok &= out[i] == 1 + i / 8;
  ok &= fails("deadlock: 64 threads at mbarrier_wait", hang, emulator::Index{1, 1, 1}, 1, 64, 64);
  ok &= fails("more arrivals", arrive_twice, emulator::Index{1, 1, 1}, 1, 32, 64);
  ok &= fails("at setmaxnreg.inc", starve, emulator::Index{1, 1, 1}, 1, 384, 64);
  ok &= fails("had not converged", one_lane_aligned, emulator::Index{1, 1, 1}, 1, 32, 64);
  ok &= fails("had not converged", one_lane_waits, emulator::Index{1, 1, 1}, 1, 32, 64);
  ok &= fails("without fence_async_shared", copy_over_a_store, emulator::Index{1, 1, 1}, 1, 32, 64, in);
  ok &= fails("livelock", poll, emulator::Index{1, 1, 1}, 1, 32, 64, &zero);
  ok &= leaves_no_context_behind();
  puts(ok ? "ok" : "FAILED");
  return !ok;
}
