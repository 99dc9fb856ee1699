// The C++ object in one of Python's, past pybind11's search for its type.
#pragma once

#include <pybind11/pybind11.h>

namespace fastpeft {

template <class Class>
Class& object(PyObject* self) {
  return *static_cast<Class*>(reinterpret_cast<pybind11::detail::instance*>(self)->get_value_and_holder().value_ptr());
}

}  // namespace fastpeft
