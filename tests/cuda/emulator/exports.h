// What the tests need beside a launcher: the machine's settings, and the words of the last failure.
#pragma once
#include "runtime_emulated.h"
// After the runtime's names have been replaced:
#include "common.cuh"

#define EXPORTED extern "C" inline __attribute__((used, visibility("default")))

/// The order of events, how many clusters the machine says it holds, and how many it does hold (0: all).
EXPORTED void emulator_set(uint64_t seed, int clusters, int resident) {
  emulator::settings = {seed, resident ? size_t(resident) : SIZE_MAX, clusters};
}

/// What the kernel ahead in the stream writes, as late as it may: called before a launch, and again for more.
EXPORTED void emulator_ahead(void* to, const void* from, size_t bytes) {
  emulator::settings.kernel_ahead = [before = emulator::settings.kernel_ahead, to, from, bytes] {
    if (before) before();
    memcpy(to, from, bytes);
  };
}

EXPORTED unsigned emulator_last_grid() { return emulator::last_grid; }

EXPORTED const char* emulator_error_text() { return fastpeft::error_text; }

#undef EXPORTED
