// Rows of integers from Python, as the bindings of the adapter take them: cheaper than an argument each.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace mosa {

// Raises ValueError for another number of them, TypeError or OverflowError for what is no 64-bit integer.
template <size_t Count>
std::array<int64_t, Count> integers(const pybind11::tuple& from, const char* name) {
  if (from.size() != Count) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(Count) + " integers, got " +
                                std::to_string(from.size()));
  }
  std::array<int64_t, Count> to;
  for (size_t i = 0; i < Count; ++i) {
    to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), static_cast<Py_ssize_t>(i)));
  }
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return to;
}

template <typename Element>
Element* address(int64_t value) {
  return reinterpret_cast<Element*>(static_cast<uintptr_t>(value));
}

}  // namespace mosa
