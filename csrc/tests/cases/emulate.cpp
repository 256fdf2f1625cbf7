// emulate PROBLEM RESULT SCHEDULE...: runs every case of PROBLEM once per schedule, compares the
// memory that the schedules leave behind, writes the outputs to RESULT and prints the names of the
// kernels that ran. Exit status 0: nothing
// found; 3: a bug was found, see stderr. A file is a sequence of int64 counts and raw bytes; the
// other side is tests/emulated/emulator.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "../emulator/grid.h"
#include "../emulator/memory.h"
#include "cases.h"

namespace emulated {
namespace {

std::map<std::string, CaseFunction>& entries() {
  static std::map<std::string, CaseFunction> all;
  return all;
}

[[noreturn]] void give_up(const std::string& why) {
  std::fprintf(stderr, "emulate: %s\n", why.c_str());
  std::exit(1);
}

class Reader {
 public:
  explicit Reader(const char* path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) give_up(std::string("cannot read ") + path);
    file_.assign(std::istreambuf_iterator<char>(stream), {});
  }
  bool at_end() const { return next_ == file_.size(); }
  int64_t integer() {
    int64_t value;
    std::memcpy(&value, take(sizeof(value)), sizeof(value));
    return value;
  }
  std::vector<char> bytes() {
    const std::size_t count = static_cast<std::size_t>(integer());
    const char* first = take(count);
    return std::vector<char>(first, first + count);
  }

 private:
  const char* take(std::size_t count) {
    if (count > file_.size() - next_) give_up("the problem file is truncated");
    next_ += count;
    return file_.data() + next_ - count;
  }
  std::vector<char> file_;
  std::size_t next_ = 0;
};

CaseData read_case(Reader& reader) {
  CaseData data;
  const std::vector<char> name = reader.bytes();
  data.name.assign(name.begin(), name.end());
  data.integers.resize(static_cast<std::size_t>(reader.integer()));
  for (int64_t& value : data.integers) value = reader.integer();
  data.buffers.resize(static_cast<std::size_t>(reader.integer()));
  for (CaseData::Buffer& buffer : data.buffers) {
    buffer.offset = reader.integer();
    buffer.bytes = reader.bytes();
  }
  return data;
}

void run_once(const CaseData& data, CaseFunction function) {
  DeviceMemory::get().release_all();
  clear_launch_log();
  Case one(data);
  const gradsafe::Status status = function(one);
  if (!status.ok()) {
    fail("status", "the launcher returned code " + std::to_string(static_cast<int>(status.code)));
  }
}

// Equal inputs must leave equal memory behind, whoever ran first.
void compare(const std::vector<LaunchRecord>& first, const std::vector<LaunchRecord>& other,
             const std::string& first_schedule) {
  if (first.size() != other.size()) fail("order dependence", "the number of launches differs");
  for (std::size_t i = 0; i < first.size(); ++i) {
    for (std::size_t a = 0; a < first[i].hashes.size(); ++a) {
      if (first[i].hashes[a] == other[i].hashes[a]) continue;
      fail("order dependence", "after " + first[i].kernel + ", " +
                                   DeviceMemory::get().allocations()[a]->name +
                                   " differs from what schedule " + first_schedule + " left");
    }
  }
}

void write_outputs(std::ofstream& stream) {
  std::vector<const Allocation*> outputs;
  for (const auto& a : DeviceMemory::get().allocations()) {
    if (a->kind == Kind::output || a->kind == Kind::inout) outputs.push_back(a.get());
  }
  const int64_t count = static_cast<int64_t>(outputs.size());
  stream.write(reinterpret_cast<const char*>(&count), sizeof(count));
  for (const Allocation* a : outputs) {
    const int64_t bytes = static_cast<int64_t>(a->bytes);
    stream.write(reinterpret_cast<const char*>(&bytes), sizeof(bytes));
    stream.write(a->begin, bytes);
  }
}

void run_all(const char* problem, const char* result, const std::vector<Schedule>& schedules) {
  Reader reader(problem);
  std::ofstream stream(result, std::ios::binary);
  for (int number = 0; !reader.at_end(); ++number) {
    const CaseData data = read_case(reader);
    const auto found = entries().find(data.name);
    if (found == entries().end()) give_up("no entry is called " + data.name);
    set_case(data.name + " #" + std::to_string(number));
    std::vector<LaunchRecord> first;
    for (std::size_t s = 0; s < schedules.size(); ++s) {
      set_schedule(schedules[s]);
      run_once(data, found->second);
      if (s == 0) {
        first = launch_log();
        for (const LaunchRecord& launch : first) std::printf("%s\n", launch.kernel.c_str());
      }
      compare(first, launch_log(), schedules[0].name);
    }
    write_outputs(stream);
  }
  if (!stream.flush()) give_up(std::string("cannot write ") + result);
}

}  // namespace

Entry::Entry(const char* name, CaseFunction function) { entries()[name] = function; }

int64_t Case::integer() {
  if (next_integer_ == data_.integers.size()) give_up(data_.name + ": too few integers");
  return data_.integers[next_integer_++];
}

static char* copy_in(const CaseData& data, std::size_t index, Kind kind) {
  if (index >= data.buffers.size()) give_up(data.name + ": too few buffers");
  const CaseData::Buffer& buffer = data.buffers[index];
  char* memory = DeviceMemory::get().allocate("buffer " + std::to_string(index), kind,
                                              buffer.bytes.size(),
                                              static_cast<std::size_t>(buffer.offset));
  if (!buffer.bytes.empty()) std::memcpy(memory, buffer.bytes.data(), buffer.bytes.size());
  return memory;
}

const void* Case::input() { return copy_in(data_, next_buffer_++, Kind::input); }
void* Case::inout() { return copy_in(data_, next_buffer_++, Kind::inout); }
void* Case::output(int64_t bytes) {
  return DeviceMemory::get().allocate("the output", Kind::output, static_cast<std::size_t>(bytes));
}
void* Case::workspace(int64_t bytes) {
  return DeviceMemory::get().allocate("the workspace", Kind::workspace,
                                      static_cast<std::size_t>(bytes));
}

}  // namespace emulated

int main(int count, char** arguments) {
  if (count < 4) emulated::give_up("usage: emulate PROBLEM RESULT SCHEDULE...");
  std::vector<emulated::Schedule> schedules;
  for (int i = 3; i < count; ++i) schedules.push_back(emulated::Schedule::parse(arguments[i]));
  emulated::run_all(arguments[1], arguments[2], schedules);
  return 0;
}
