// One fiber for each CUDA thread, all on one thread of the system, in an order drawn from a seed.
//
// So a run can be repeated; and where no fiber can go on, the program is known to hang, and the fault says who waits.
// Under ThreadSanitizer every fiber counts as a thread. Only what the kernel itself does to memory is shown to it, and
// orders come only from the operations that promise one: `happens_before` on one side, `happens_after` on the other.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator {

/// What a real machine would answer with a hang, a trap or wrong numbers. The first one ends the run.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

#ifdef __SANITIZE_THREAD__
inline void happens_before(void* event) { __tsan_release(event); }
inline void happens_after(void* event) { __tsan_acquire(event); }
inline void ignore_begin() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void ignore_end() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
inline void* tsan_here() { return __tsan_get_current_fiber(); }
inline void* tsan_create() { return __tsan_create_fiber(0); }
inline void tsan_destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void tsan_switch(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: a switch orders nothing
#else
inline void happens_before(void*) {}
inline void happens_after(void*) {}
inline void ignore_begin() {}
inline void ignore_end() {}
inline void* tsan_here() { return nullptr; }
inline void* tsan_create() { return nullptr; }
inline void tsan_destroy(void*) {}
inline void tsan_switch(void*) {}
#endif

/// A scope whose accesses are the emulator's own business.
struct Unseen {
  Unseen() { ignore_begin(); }
  ~Unseen() { ignore_end(); }
};

/// Within Unseen: a scope whose accesses are the emulated machine's.
struct Seen {
  Seen() { ignore_end(); }
  ~Seen() { ignore_begin(); }
};

struct Fiber {
  static constexpr size_t STACK = 256 << 10;

  explicit Fiber(std::function<void()> body);
  ~Fiber() {
    if (finished) tsan_destroy(tsan);  // of one that was abandoned, ThreadSanitizer would complain
    munmap(stack, STACK);
  }

  std::function<void()> body;
  void* user = nullptr;  // what runs here
  bool finished = false;
  const char* waits_for = nullptr;  // while it is in a queue
  void* stack = nullptr;
  void* tsan = nullptr;
  ucontext_t context;
};

/// Fibers that wait for something.
using Queue = std::vector<Fiber*>;

/// Who can run, what the asynchronous units have yet to do, and the dice.
struct Scheduler {
  std::vector<Fiber*> ready;
  std::vector<std::function<void()>> pending;  // asynchronous copies; done in any order, at any time
  std::vector<std::function<void()>> late;     // those that are done only when nobody can go on without them
  Fiber* current = nullptr;
  size_t alive = 0, idle = 0;
  std::string fault;
  uint64_t seed = 1;
  ucontext_t context;
  void* tsan = nullptr;

  uint64_t draw(uint64_t below) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (seed >> 8) % below;
  }
};
inline Scheduler scheduler;

inline void fiber_main() {
  ignore_begin();  // a fiber begins inside the emulator, like everything that is not the kernel
  Fiber* self = scheduler.current;
  try {
    self->body();
  } catch (const Fault& fault) {
    scheduler.fault = fault.what();
  }
  self->finished = true;
  --scheduler.alive;
  scheduler.idle = 0;
  happens_before(&scheduler);
  ignore_end();
  tsan_switch(scheduler.tsan);
  setcontext(&scheduler.context);
}

inline Fiber::Fiber(std::function<void()> body) : body(std::move(body)) {
  stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  tsan = tsan_create();
}

/// Back to the scheduler; returns when it is this fiber's turn again.
inline void suspend() {
  Fiber* self = scheduler.current;
  tsan_switch(scheduler.tsan);
  swapcontext(&self->context, &scheduler.context);
}

inline void notify(Queue& queue) {
  scheduler.idle = 0;
  scheduler.ready.insert(scheduler.ready.end(), queue.begin(), queue.end());
  queue.clear();
}

template <class Condition>
void wait_until(Queue& queue, const char* what, Condition condition) {
  while (!condition()) {
    queue.push_back(scheduler.current);
    scheduler.current->waits_for = what;
    suspend();
  }
}

/// Work that will be done some time; half of it as late as possible.
inline void do_later(std::function<void()> work) {
  (scheduler.draw(2) ? scheduler.pending : scheduler.late).push_back(std::move(work));
}

inline void do_one(std::vector<std::function<void()>>& works) {
  std::swap(works[scheduler.draw(works.size())], works.back());
  auto work = std::move(works.back());
  works.pop_back();
  work();
}

/// For a loop that polls: others run first. Where everybody polls for long, nothing will ever change.
inline void yield() {
  if (++scheduler.idle > 200000) throw Fault("livelock: every thread polls, and nothing changes");
  scheduler.ready.push_back(scheduler.current);
  suspend();
}

/// Runs fibers and asynchronous work in random order; `refill` may start more when fewer are alive. Every other time
/// the fiber that became ready last goes on, so that some get far ahead of the others.
template <class Refill, class Describe>
void run_all(Refill refill, Describe describe) {
  auto& s = scheduler;
  s.tsan = tsan_here();
  for (;;) {
    refill();
    if (!s.pending.empty() && (s.ready.empty() || s.draw(8) == 0)) {
      do_one(s.pending);
      continue;
    }
    if (s.ready.empty() && s.late.empty()) break;
    if (s.ready.empty()) {
      do_one(s.late);
      continue;
    }
    if (s.draw(2)) std::swap(s.ready[s.draw(s.ready.size())], s.ready.back());
    s.current = s.ready.back();
    s.ready.pop_back();
    tsan_switch(s.current->tsan);
    swapcontext(&s.context, &s.current->context);
    s.current = nullptr;
    if (!s.fault.empty()) throw Fault(s.fault);
  }
  happens_after(&s);
  if (s.alive) throw Fault("deadlock: " + describe());
}

}  // namespace emulator
