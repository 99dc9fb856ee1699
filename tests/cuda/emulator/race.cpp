// Each form of lora_linear once, small, for ThreadSanitizer: more k tiles than stages, two tiles a cluster.
#include <cstdlib>
#include <vector>

#include "lora_linear.cu"

int main(int count, char** arguments) {
  const int64_t M = 136, N = 264, K = 264, R = 24, S = R;
  // Every value is 0.5 in bfloat16; vectors are aligned to 16 bytes by malloc.
  std::vector<uint16_t> x(M * K, 0x3f00), w(N * K, 0x3f00), s(M * S, 0x3f00), a(R * K, 0x3f00), b(N * R, 0x3f00),
      y(M * N);
  std::vector<uint16_t> dx(M * K);
  std::vector<uint32_t> workspace(fastpeft_lora_linear_workspace(M) / 4);
  const int64_t seed = 7;
  emulator_set(count > 1 ? atoi(arguments[1]) : 1, 1, 0);
  int code = fastpeft_lora_linear(x.data(), K, w.data(), K, s.data(), S, b.data(), R, b.data(), y.data(), N, M, N, K, R,
                                  0, 0, nullptr);
  for (int64_t i = 0; !code && i < M * N; ++i) code = y[i] != 0x4291;  // (264 + 24) / 4 + 0.5 = 72.5
  if (!code)
    code = fastpeft_lora_linear_backward(y.data(), N, w.data(), K, s.data(), S, a.data(), K, dx.data(), K, M, N, K, R,
                                         &seed, 6554, 1.f, 0, 0, nullptr);
  emulator_set(2, 1, 0);
  if (!code)
    code = fastpeft_lora_linear_down(x.data(), K, w.data(), K, a.data(), K, b.data(), R, nullptr, s.data(), S, y.data(),
                                     N, M, N, K, R, 1.f, &seed, 6554, 1.f, workspace.data(), 0, nullptr);
  puts(code ? emulator_error_text() : "ok");
  return code != 0;
}
