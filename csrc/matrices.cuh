// What a warp does with matrices: pairs of 16-bit elements, mma.sync, stmatrix. A part of ptx.cuh.
#pragma once

namespace ptx {

/// Two floats as a pair of T, `low` in the lower half.
template <class T>
PTX uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

/// The inverse of pack.
template <class T>
PTX float2 unpack(uint32_t packed) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
  } else {
    return __half22float2(*reinterpret_cast<__half2*>(&packed));
  }
}

/// c [16, 8] += a [16, 16] b [16, 8] for a warp, float sums of T products. With g = lane / 4 and t = lane % 4:
/// a0..a3 hold rows g, g + 8, g, g + 8 at columns 2t (a0, a1) and 2t + 8 (a2, a3); b0, b1 hold column g at rows 2t and
/// 2t + 8; c holds row g (c0, c1) and row g + 8 (c2, c3) at columns 2t, 2t + 1.
template <class T>
PTX void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

/// Rounds towards zero to what tensor cores keep of a float in TF32: 10 bits after the point.
PTX float tf32(float value) { return __uint_as_float(__float_as_uint(value) & 0xffffe000u); }

/// c [16, 8] += a [16, 8] b [8, 8] for a warp in TF32: the lowest 13 bits of a and b are not looked at. a0, a1 hold
/// rows g and g + 8 at column t, a2, a3 at column t + 4; b0, b1 hold column g at rows t and t + 4; c as above.
PTX void mma_m16n8k8_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

/// Stores four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and r_i holds
/// row lane / 4, columns 2 (lane % 4) and the next, of matrix i.
PTX void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r0),
               "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace ptx
