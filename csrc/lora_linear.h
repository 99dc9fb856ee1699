// The launchers of lora_linear.cu: pointers, elements from one row to the next (rows are contiguous), sizes, a stream.
//
// Each returns 0, or a code of common.cuh's Error whose words are in its error_text. Nothing is allocated and nothing
// waits for the device, so a call can be captured in a CUDA graph. dtype, of every matrix: 0 bfloat16, 1 float16; sums
// are float. Every matrix and every row begins at a multiple of 16 bytes. config: 0 tiles of 128 x 256, 1 of 128 x 128.
#pragma once
#include <cstdint>

extern "C" {

/// y [M, N] = x [M, K] w [N, K]ᵀ + s [M, R] b [N, R]ᵀ (+ bias [N]). K is a multiple of 8; R is 0 to 256.
int fastpeft_lora_linear(const void* x, int64_t stride_x, const void* w, int64_t stride_w, const void* s,
                         int64_t stride_s, const void* b, int64_t stride_b, const void* bias, void* y, int64_t stride_y,
                         int64_t M, int64_t N, int64_t K, int64_t R, int dtype, int config, void* stream);

/// dx [M, K] = mask ∘ (ds [M, R] a [R, K]) · inverse_keep + dy [M, N] w [N, K]. The mask is dropout.cuh's; `seed` is
/// one int64 on the device, and may be null where threshold is 0. N is a multiple of 8; R is 0 to 256.
int fastpeft_lora_linear_backward(const void* dy, int64_t stride_dy, const void* w, int64_t stride_w, const void* ds,
                                  int64_t stride_ds, const void* a, int64_t stride_a, void* dx, int64_t stride_dx,
                                  int64_t M, int64_t N, int64_t K, int64_t R, const int64_t* seed, uint32_t threshold,
                                  float inverse_keep, int dtype, int config, void* stream);

/// The forward form with s [M, R] = scale · drop(x) aᵀ computed on the way, and written. R is 1 to 64; tiles 128 x 256.
/// `workspace`: fastpeft_lora_linear_workspace(M) bytes, zeros before the first call; one call at a time may use it.
int fastpeft_lora_linear_down(const void* x, int64_t stride_x, const void* w, int64_t stride_w, const void* a,
                              int64_t stride_a, const void* b, int64_t stride_b, const void* bias, void* s,
                              int64_t stride_s, void* y, int64_t stride_y, int64_t M, int64_t N, int64_t K, int64_t R,
                              float scale, const int64_t* seed, uint32_t threshold, float inverse_keep, void* workspace,
                              int dtype, void* stream);

int64_t fastpeft_lora_linear_workspace(int64_t M);
}
