// The whole of a layer's call where nothing but x is new: what it found out about itself holds, and its siblings share.
#pragma once

#include <pybind11/pybind11.h>

#include "guards.h"
#include "planned.h"

namespace fastpeft {

// A planned function with all of its arguments but one tensor.
class Bound {
 public:
  // `cast` are the arguments that autocast casts, `kept` those that it leaves where they are float32.
  Bound(pybind11::object planned, pybind11::tuple arguments, size_t place, pybind11::tuple cast, pybind11::tuple kept)
      : planned_(std::move(planned)),
        arguments_(std::move(arguments)),
        cast_(std::move(cast)),
        kept_(std::move(kept)),
        place_(place) {
    if (planned_ && !pybind11::isinstance<Planned>(planned_)) throw pybind11::type_error("Bound: expected a Planned");
  }
  // The outputs for x, or None where autocast has something to cast first.
  pybind11::object call(PyObject* x) const;

  int visit(visitproc visit, void* argument) const;
  void clear() {
    planned_ = pybind11::object();
    arguments_ = cast_ = kept_ = pybind11::tuple();
  }

 private:
  bool casts(const at::Tensor& x) const;

  pybind11::object planned_;
  pybind11::tuple arguments_, cast_, kept_;
  size_t place_;
};

// What fastpeft/nn/front.py describes.
class Front {
 public:
  Front(pybind11::object layer, pybind11::object guards, pybind11::object branch, pybind11::object bound,
        pybind11::object group, pybind11::object me, pybind11::object part)
      : layer_(std::move(layer)),
        guards_(std::move(guards)),
        branch_(std::move(branch)),
        bound_(std::move(bound)),
        group_(std::move(group)),
        me_(std::move(me)),
        part_(std::move(part)) {}
  // The layer's output, or None where only Python can tell.
  pybind11::object call(PyObject* layer, PyObject* x) const;

  int visit(visitproc visit, void* argument) const;
  void clear() { *this = Front({}, {}, {}, {}, {}, {}, {}); }

 private:
  pybind11::object alone(PyObject* x) const;
  pybind11::object shared(PyObject* x) const;
  bool leads(const pybind11::object& plan, PyObject* x) const;
  bool follows(const pybind11::object& plan) const;

  pybind11::object layer_, guards_, branch_, bound_, group_, me_, part_;
};

}  // namespace fastpeft
