// Functions of the CUDA driver, asked of the driver that is there: nothing is linked, so importing needs no driver.
#pragma once
#include "common.cuh"

namespace fastpeft {

/// The driver's function of this name, or null.
template <class Function>
Function* driver_entry(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const auto error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) return reinterpret_cast<Function*>(found);
  cudaGetLastError();  // not left for whoever asks next
  return nullptr;
}

}  // namespace fastpeft
