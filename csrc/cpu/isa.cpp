// This file is compiled without any instruction-set flag: it must run on every machine.
#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gradsafe {
namespace {

#if defined(__x86_64__) && defined(GRADSAFE_X86_KERNELS)
struct Features {
  bool avx2 = false;
  bool avx512 = false;
  bool bf16_pairs = false;
};

uint64_t extended_control_register() {
  uint32_t low = 0, high = 0;
  // The xgetbv intrinsic would need -mxsave for this file; the plain instruction does not.
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

Features probe() {
  Features features;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool osxsave = c & (1u << 27);
  const bool fma = c & (1u << 12);
  const bool f16c = c & (1u << 29);
  if (!osxsave) return features;
  const uint64_t state = extended_control_register();
  const bool os_ymm = (state & 0x6) == 0x6;    // xmm and ymm saved on a context switch
  const bool os_zmm = (state & 0xe6) == 0xe6;  // opmask and all zmm state too
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  const bool avx2 = b & (1u << 5);
  const bool f = b & (1u << 16), dq = b & (1u << 17), bw = b & (1u << 30), vl = b & (1u << 31);
  features.avx2 = os_ymm && avx2 && fma && f16c;
  features.avx512 = features.avx2 && os_zmm && f && dq && bw && vl;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    features.bf16_pairs = features.avx512 && a & (1u << 5);
  }
  return features;
}

const Features& machine() {
  static const Features features = probe();
  return features;
}
#endif

constexpr Isa kLevels[] = {Isa::avx512, Isa::avx2, Isa::scalar};  // best first

std::string list_available() {
  std::string text;
  for (const std::string& name : available_isas()) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Isa best() {
  for (Isa isa : kLevels) {
    if (isa_available(isa)) return isa;
  }
  return Isa::scalar;
}

Isa parse(const std::string& name, const char* origin) {
  if (name == "auto") return best();
  for (Isa isa : kLevels) {
    if (name != isa_name(isa)) continue;
    if (!isa_available(isa)) {
      throw std::runtime_error("gradsafe: " + std::string(origin) + "=" + name +
                               ": this machine or build cannot run it (available: " +
                               list_available() + ")");
    }
    return isa;
  }
  throw std::runtime_error("gradsafe: " + std::string(origin) + "=" + name +
                           ": unknown instruction set (choose auto, scalar, avx2 or avx512)");
}

std::atomic<int> chosen{-1};

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

bool isa_available(Isa isa) {
  if (isa == Isa::scalar) return true;
#if defined(__x86_64__) && defined(GRADSAFE_X86_KERNELS)
  return isa == Isa::avx2 ? machine().avx2 : machine().avx512;
#else
  return false;
#endif
}

Isa current_isa() {
  int level = chosen.load(std::memory_order_acquire);
  if (level < 0) {
    const char* forced = std::getenv("GRADSAFE_FORCE_ISA");
    level = static_cast<int>(forced && *forced ? parse(forced, "GRADSAFE_FORCE_ISA") : best());
    chosen.store(level, std::memory_order_release);
  }
  return static_cast<Isa>(level);
}

bool has_bf16_pairs() {
#if defined(__x86_64__) && defined(GRADSAFE_X86_KERNELS)
  return current_isa() == Isa::avx512 && machine().bf16_pairs;
#else
  return false;
#endif
}

void set_isa(const std::string& name) {
  chosen.store(static_cast<int>(parse(name, "isa")), std::memory_order_release);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kLevels) {
    if (isa_available(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

}  // namespace gradsafe
