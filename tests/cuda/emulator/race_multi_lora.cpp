// Both paths of multi_lora once, small, under ThreadSanitizer: two slots, three slices; the third one's B comes in one
// piece to where the first one's, of one slot, came row by row.
#include <cstdlib>
#include <vector>

#include "multi_lora.cu"

int main(int count, char** arguments) {
  const int T = 11, K = 96, N = 136, SLOTS = 2, SLICES = 3, R[SLICES] = {32, 16, 16};
  // Every value is 0.5 in bfloat16; vectors are aligned to 16 bytes by malloc.
  std::vector<uint16_t> x(T * K, 0x3f00), a[SLICES], b[SLICES], y[SLICES];
  std::vector<float> scales(SLOTS, 1.f), s(T * 64), planes(8 * 2 * 64 * 16);
  std::vector<int> order(T), starts = {0, 9, 11}, tiles = {0, 1, 0, 9}, ranks = {32, 24};
  for (int i = 0; i < T; ++i) order[i] = T - 1 - i;
  multi_lora::Params p = {};
  for (int i = 0; i < SLICES; ++i) {
    a[i].assign(SLOTS * R[i] * K, 0x3f00);
    b[i].assign(SLOTS * N * R[i], 0x3f00);
    y[i].assign(T * N, 0);
    p.slices[i] = {a[i].data(), b[i].data(), y[i].data(), scales.data(), i ? nullptr : ranks.data(),
                   R[i] * K, K, N * R[i], R[i], N, R[i], N};
  }
  p.x = x.data(), p.order = order.data(), p.starts = starts.data(), p.tiles = tiles.data();
  p.s = s.data(), p.planes = planes.data(), p.stride_xm = K, p.stride_tiles = 2, p.stride_sm = 64;
  p.k = K, p.slice_count = SLICES, p.tile = 16, p.tile_count = 2;
  int code = 0;
  for (int path = 0; !code && path < 2; ++path) {
    emulator_set(count > 1 ? atoi(arguments[1]) : 1, 1, 1);
    code = fastpeft_multi_lora(&p, 0, path, 0, nullptr);
  }
  // S is K / 4 = 24 a rank, y twice half of it a rank: 768 and 576 for 32 and 24 ranks, 384 for 16.
  for (int i = 0; !code && i < T * N; ++i)
    code = y[0][i] != (i / N < 2 ? 0x4410 : 0x4440) || y[1][i] != 0x43c0 || y[2][i] != 0x43c0;
  puts(code ? emulator_error_text() : "ok");
  return code != 0;
}
