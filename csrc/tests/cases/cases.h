// How a test reaches a kernel: a case has a name, integers and buffers, all sent by the test. An
// entry in csrc/tests/cases reads them, fills device memory and calls the launcher.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gradsafe/types.h"

namespace emulated {

struct CaseData {
  struct Buffer {
    std::vector<char> bytes;
    int64_t offset;  // past a 256-byte border, where its first byte shall lie
  };
  std::string name;
  std::vector<int64_t> integers;
  std::vector<Buffer> buffers;
};

// Hands out a case's data in the order in which the test wrote it.
class Case {
 public:
  explicit Case(const CaseData& data) : data_(data) {}

  int64_t integer();
  // Copies of the next buffer in device memory.
  const void* input();
  void* inout();  // also a result
  // Poisoned device memory. Outputs are results, returned in the order of these calls.
  void* output(int64_t bytes);
  void* workspace(int64_t bytes);

 private:
  const CaseData& data_;
  std::size_t next_integer_ = 0, next_buffer_ = 0;
};

using CaseFunction = gradsafe::Status (*)(Case&);

// Defining one of these, at namespace level, makes an entry known.
struct Entry {
  Entry(const char* name, CaseFunction function);
};

}  // namespace emulated
