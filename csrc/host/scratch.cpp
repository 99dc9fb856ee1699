// Memory that is needed again and again, where PyTorch's allocator gives it back to the system: on a CPU fresh pages
// cost more than what is written into them.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <cstdint>
#include <memory>

namespace fastpeft {
namespace {

struct Memory {
  at::DataPtr data;
  int64_t bytes;
};

thread_local bool over = false;  // of no type that is destroyed: read behind the end of the thread's other variables

struct Keeper {
  std::unique_ptr<Memory> memory;
  ~Keeper() { over = true; }
};

thread_local Keeper keeper;

// The thread keeps the largest of what is given back on it.
void give_back(Memory* given) {
  std::unique_ptr<Memory> memory(given);
  if (!over && (!keeper.memory || keeper.memory->bytes < memory->bytes)) keeper.memory.swap(memory);
}

at::Tensor scratch(int64_t count, at::ScalarType dtype) {
  TORCH_CHECK(count >= 0, "scratch: count is ", count);
  const int64_t bytes = count * static_cast<int64_t>(c10::elementSize(dtype));
  std::unique_ptr<Memory> memory = std::move(keeper.memory);
  if (!memory || memory->bytes < bytes)
    memory = std::make_unique<Memory>(Memory{at::getCPUAllocator()->allocate(bytes), bytes});
  Memory* const given = memory.release();
  return at::from_blob(given->data.get(), {count}, [given](void*) { give_back(given); }, dtype);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastpeft, m) { m.def("scratch(int count, ScalarType dtype) -> Tensor"); }

TORCH_LIBRARY_IMPL(fastpeft, CompositeExplicitAutograd, m) { m.impl("scratch", &scratch); }

}  // namespace fastpeft
