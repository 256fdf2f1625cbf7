// Which instruction sets the machine and its operating system support, and which one is in use.
#pragma once

#include <string>
#include <vector>

namespace gradsafe {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2 };

const char* isa_name(Isa isa);

// True if the build holds code for `isa` and this machine (cpuid) and its OS (xgetbv) can run it.
bool isa_available(Isa isa);

// The level in use. First call: the best available one, or the one GRADSAFE_FORCE_ISA names.
// Throws std::runtime_error if that variable names an unknown or unavailable level.
Isa current_isa();

// True if the level in use also has kernels for pairs of bfloat16 (AVX512_BF16).
bool has_bf16_pairs();

// Switches the level for all later calls; "auto" returns to the best one. Throws like current_isa.
void set_isa(const std::string& name);

std::vector<std::string> available_isas();

}  // namespace gradsafe
