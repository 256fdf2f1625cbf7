// Names from the executable's own symbol table: kernels, and the shared variables they declare.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace emulated {

struct Variable {
  char* begin;
  std::size_t bytes;
  std::string name;      // as written in the kernel
  std::string function;  // mangled name of the function that declares it
};

struct Symbols {
  // The segment that holds the shared variables of all kernels.
  char* shared_begin = nullptr;
  std::size_t shared_bytes = 0;
  std::vector<Variable> variables;

  static const Symbols& get();
  std::string mangled_name(const void* function) const;  // empty if unknown
};

std::string demangled(const std::string& mangled);
// File and line of the instruction before a return address; empty if it cannot be found.
std::string source_line(const void* return_address);

}  // namespace emulated
