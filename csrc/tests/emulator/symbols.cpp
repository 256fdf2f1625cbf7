#include "symbols.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>

namespace emulated {
namespace {

struct Image {
  std::vector<char> file;
  uintptr_t base = 0;  // where the executable is loaded, 0 if it is not relocatable
  std::map<uintptr_t, std::string> functions;
};

Image& image() {
  static Image only;
  return only;
}

// A static local variable is mangled as _ZZ <function> E <length> <name>.
Variable variable_of(const std::string& mangled, char* address, std::size_t bytes) {
  Variable v{address, bytes, mangled, ""};
  const std::string text = demangled(mangled);
  const std::size_t colons = text.rfind("::");
  if (mangled.rfind("_ZZ", 0) == 0 && colons != std::string::npos) {
    v.name = text.substr(colons + 2);
    v.function = mangled;
  }
  return v;
}

template <class T>
const T* at(const std::vector<char>& file, std::size_t offset) {
  return reinterpret_cast<const T*>(file.data() + offset);
}

Symbols read_symbols() {
  Symbols symbols;
  // The first object is the executable itself.
  dl_iterate_phdr([](dl_phdr_info* info, std::size_t, void* out) {
    Symbols& s = *static_cast<Symbols*>(out);
    image().base = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
      s.shared_begin = static_cast<char*>(info->dlpi_tls_data);
      s.shared_bytes = info->dlpi_phdr[i].p_memsz;
    }
    return 1;
  }, &symbols);

  std::ifstream stream("/proc/self/exe", std::ios::binary);
  std::vector<char>& file = image().file;
  file.assign(std::istreambuf_iterator<char>(stream), {});
  const auto* header = at<Elf64_Ehdr>(file, 0);
  const auto* sections = at<Elf64_Shdr>(file, header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* entries = at<Elf64_Sym>(file, sections[i].sh_offset);
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    for (std::size_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); ++k) {
      const Elf64_Sym& e = entries[k];
      if (e.st_shndx == SHN_UNDEF) continue;
      const std::string name = names + e.st_name;
      if (ELF64_ST_TYPE(e.st_info) == STT_FUNC) {
        image().functions.emplace(image().base + e.st_value, name);
      } else if (ELF64_ST_TYPE(e.st_info) == STT_TLS) {
        symbols.variables.push_back(
            variable_of(name, symbols.shared_begin + e.st_value, e.st_size));
      }
    }
  }
  if (image().functions.empty()) {
    std::fprintf(stderr, "emulated grid: the executable has no symbol table; link it unstripped\n");
    std::exit(1);
  }
  return symbols;
}

}  // namespace

const Symbols& Symbols::get() {
  static const Symbols only = read_symbols();
  return only;
}

std::string Symbols::mangled_name(const void* function) const {
  const auto found = image().functions.find(reinterpret_cast<uintptr_t>(function));
  return found == image().functions.end() ? "" : found->second;
}

std::string demangled(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : mangled;
  std::free(text);
  const std::string noise = "(anonymous namespace)::";
  for (std::size_t p; (p = result.find(noise)) != std::string::npos;) result.erase(p, noise.size());
  return result;
}

std::string source_line(const void* return_address) {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (length <= 0) return "";
  path[length] = 0;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(return_address) - image().base - 1;
  char command[4200];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' 0x%zx 2>/dev/null", path,
                static_cast<std::size_t>(offset));
  FILE* pipe = popen(command, "r");
  if (!pipe) return "";
  // Innermost first: one line per function that was inlined into the next.
  std::string text;
  char line[1024];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) {
    const std::string frame(line, std::strcspn(line, " \n"));
    const std::size_t root = frame.rfind("csrc/");
    if (root == std::string::npos || frame.find("emulated_") != std::string::npos) continue;
    text += (text.empty() ? "" : " in ") + frame.substr(root);
  }
  pclose(pipe);
  return text;
}

}  // namespace emulated
