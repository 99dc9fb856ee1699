// What was found of Python's objects once and has to hold for that to be found again.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace fastpeft {

class Guards {
 public:
  // A dictionary holds exactly this object under this key, or nothing under it.
  void is(pybind11::dict dictionary, pybind11::object key, pybind11::object value);
  void absent(pybind11::dict dictionary, pybind11::object key);
  // A dictionary, list or set has nothing in it.
  void empty(pybind11::object container);
  // A list or tuple has exactly these objects.
  void items(pybind11::object sequence);
  // An object is of this very type.
  void type(pybind11::object object);
  // A tensor's dtype and device are what they are now.
  void tensor(pybind11::object tensor);
  // What `holds` is asked of: dtype and device of its tensor, whether autocast is on there.
  void input(pybind11::object like);

  // Whether all of it is as it was, for this input; None: for one like that which `input` was given.
  bool holds(pybind11::handle x) const;
  // Rises when a guarded tensor is modified in place.
  int64_t versions() const;

  // Python's collector of cycles: what is guarded often owns the guards.
  int visit(visitproc visit, void* argument) const;
  void clear() { *this = Guards(); }

 private:
  struct Dictionary {
    pybind11::object dictionary;
    std::vector<std::pair<pybind11::object, pybind11::object>> entries;  // a value that is null: absent
    mutable uint64_t seen;                                               // its state when the entries held

    bool holds() const;
  };
  struct Items {
    pybind11::object sequence;
    std::vector<pybind11::object> objects;
  };
  struct Kind {
    pybind11::object object;
    PyTypeObject* type;
  };
  struct Facts {
    pybind11::object tensor;
    at::ScalarType dtype;
    at::Device device;
  };
  std::vector<Dictionary> dictionaries_;
  std::vector<pybind11::object> empty_;
  std::vector<Items> items_;
  std::vector<Kind> kinds_;
  std::vector<Facts> tensors_;
  at::ScalarType dtype_ = at::ScalarType::Undefined;
  at::Device device_ = at::kCPU;
  bool autocast_ = false, made_ = false;
};

}  // namespace fastpeft
