// Which device a launch goes to. This library has a CUDA runtime of its own, so torch's choice says nothing to it.
#pragma once
#include <cuda.h>

#include "driver.cuh"

namespace fastpeft {

/// Makes a device the current one, and afterwards the thread's context what it was. Not by cudaSetDevice, which creates
/// a context, hundreds of megabytes, on a device that this process may never use.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    static const auto current = driver_entry<CUresult(CUcontext*)>("cuCtxGetCurrent");
    static const auto make_current = driver_entry<CUresult(CUcontext)>("cuCtxSetCurrent");
    restore_ = current && make_current && current(&before_) == CUDA_SUCCESS ? make_current : nullptr;
    failed_ = check(cudaSetDevice(device), "device");
  }
  ~OnDevice() {
    if (restore_) restore_(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  int failed() const { return failed_; }

 private:
  CUresult (*restore_)(CUcontext) = nullptr;
  CUcontext before_ = nullptr;
  int failed_ = OK;
};

}  // namespace fastpeft
