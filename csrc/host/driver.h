// The one function of CUDA's driver that is needed to launch, found in the library that PyTorch has loaded.
#pragma once

#include <cstdint>

namespace fastpeft {

// Launches on a device whose number is given; throws with the driver's word for what went wrong.
void launch(void* function, const unsigned grid[3], unsigned threads, unsigned shared, void* stream, void** parameters,
            int device);

}  // namespace fastpeft
