// A function whose calls are recorded once, as programs, and then run without Python.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "program.h"

namespace fastpeft {

// How the gradients of a plan are computed: by programs for what has been recorded, else by a Python function
// (saved, gradients, record) -> (gradients, a Program or None).
class Backward {
 public:
  explicit Backward(pybind11::object python) : python_(std::move(python)) {}
  ~Backward();
  std::vector<at::Tensor> run(std::vector<at::Tensor> saved, std::vector<at::Tensor> gradients);

 private:
  std::vector<at::Tensor> in_python(const std::vector<at::Tensor>& saved, const std::vector<at::Tensor>& gradients,
                                    const std::string* key);
  struct Seen {
    int times = 0;
    std::shared_ptr<const Program> program;
  };
  pybind11::object python_;
  std::mutex mutex_;
  std::unordered_map<std::string, Seen> seen_;
};

// What stands for a call: its program, which returns the outputs and then what backward needs.
struct Plan {
  std::shared_ptr<const Program> program;
  size_t outputs = 0;
  std::vector<std::pair<size_t, std::vector<int64_t>>> views;  // arguments that autograd is given in other shapes
  std::shared_ptr<Backward> backward;  // none where nobody asks for gradients
};

// Calls `slow` until a call has been seen before, then has `record` make a plan of it, then runs the plan.
class Planned {
 public:
  Planned(pybind11::object slow, pybind11::object record) : slow_(std::move(slow)), record_(std::move(record)) {}
  pybind11::object call(PyObject* const* arguments, Py_ssize_t count);
  void clear() { seen_.clear(); }
  size_t plans() const;

 private:
  struct Seen {
    int times = 0;
    bool refused = false;
    std::shared_ptr<const Plan> plan;
  };
  pybind11::object slow_, record_;
  std::unordered_map<std::string, Seen> seen_;  // under Python's lock
};

}  // namespace fastpeft
