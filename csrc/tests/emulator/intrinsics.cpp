// Matrix instructions, asynchronous copies and half-precision conversions.
#include <cmath>
#include <cstring>

#include "../emulated_tensor_core.h"
#include "access.h"
#include "grid.h"
#include "memory.h"

namespace emulated {
namespace {

uint16_t half_of(uint32_t word, int high) { return static_cast<uint16_t>(word >> (16 * high)); }

struct MmaData {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
  Widen widen;
};

// Fragment layout (PTX ISA, "Matrix fragments for mma.m16n8k16"), with g = lane / 4, t = lane % 4:
//   a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1, in a[2], a[3] plus 8
//   b[0..1]: column g; rows 2t, 2t + 1, in b[1] plus 8
//   c[0..3]: rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
void exchange_mma(void* const (&lanes)[kLanes], unsigned) {
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const MmaData& data = *static_cast<MmaData*>(lanes[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned r = 0; r < 4; ++r) {
      for (unsigned h = 0; h < 2; ++h) {
        a[g + r % 2 * 8][2 * t + r / 2 * 8 + h] = data.widen(half_of(data.a[r], h));
        if (r < 2) b[2 * t + r * 8 + h][g] = data.widen(half_of(data.b[r], h));
      }
    }
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    float* c = static_cast<MmaData*>(lanes[lane])->c;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      double sum = c[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
      c[i] = static_cast<float>(sum);
    }
  }
}

struct Tf32Data {
  float* c;
  const uint32_t *a, *b;
};

float truncate_to_float(double value) {
  const float nearest = static_cast<float>(value);
  const bool away = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return away ? std::nextafter(nearest, 0.0f) : nearest;
}

// Layout in mma.cuh.
void exchange_tf32(void* const (&lanes)[kLanes], unsigned) {
  float a[16][8], b[8][8];
  const auto read = [](uint32_t bits) {
    bits &= ~0x1fffu;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const Tf32Data& data = *static_cast<Tf32Data*>(lanes[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned r = 0; r < 4; ++r) {
      a[g + r % 2 * 8][t + r / 2 * 4] = read(data.a[r]);
      if (r < 2) b[t + r * 4][g] = read(data.b[r]);
    }
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    float* c = static_cast<Tf32Data*>(lanes[lane])->c;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      double sum = c[i];
      for (int k = 0; k < 8; ++k) sum += static_cast<double>(a[row][k]) * b[k][col];
      c[i] = truncate_to_float(sum);
    }
  }
}

struct MatrixData {
  uint32_t* registers;
  const char* row;
  int count;
  bool transposed;
};

// Lane 8 m + i gives the address of row i of matrix m; register m of lane l gets the elements
// (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix m or of its transpose.
void exchange_matrix(void* const (&lanes)[kLanes], unsigned) {
  const MatrixData& first = *static_cast<MatrixData*>(lanes[0]);
  for (int m = 0; m < first.count; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) {
      std::memcpy(matrix[i], static_cast<MatrixData*>(lanes[8 * m + i])->row, sizeof(matrix[i]));
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const unsigned r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = first.transposed ? matrix[c][r] : matrix[r][c];
      const uint32_t high = first.transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      static_cast<MatrixData*>(lanes[lane])->registers[m] = low | high << 16;
    }
  }
}

}  // namespace

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen) {
  MmaData data{c, a, b, widen};
  warp_collective("mma_m16n8k16", ~0u, &data, &exchange_mma, {"mma.cuh", 0});
}

void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Tf32Data data{c, a, b};
  warp_collective("mma_m16n8k8_tf32", ~0u, &data, &exchange_tf32, {"mma.cuh", 1});
}

void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row) {
  // Only the lanes that give an address of one of the matrices read; the others' is ignored.
  if (lane() < 8 * count) {
    check_access(row, 16, 16, Touch::read, __builtin_return_address(0));
  }
  MatrixData data{registers, static_cast<const char*>(row), count, transposed};
  const char* name = count == 1 ? "ldmatrix.x1" : count == 2 ? "ldmatrix.x2" : "ldmatrix.x4";
  warp_collective(name, ~0u, &data, &exchange_matrix, {"mma.cuh", transposed});
}

void cp_async(void* to, const void* from, int bytes, int valid_bytes) {
  const void* code = __builtin_return_address(0);
  if (valid_bytes < 0 || valid_bytes > bytes) fail("async copy", "valid_bytes is out of range");
  check_access(to, bytes, bytes, Touch::start_copy, code);
  if (valid_bytes > 0) check_access(from, valid_bytes, 1, Touch::read, code);
  if (reinterpret_cast<std::size_t>(from) % bytes != 0) {
    fail("misaligned", "the source of an asynchronous copy is not aligned to its size");
  }
  std::memset(to, kPoison, bytes);
  running()->copy_groups.back().push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid_bytes});
}

void cp_async_commit() { running()->copy_groups.emplace_back(); }

void cp_async_wait(int groups_in_flight) {
  const void* code = __builtin_return_address(0);
  auto& groups = running()->copy_groups;
  while (groups.size() - 1 > static_cast<std::size_t>(groups_in_flight)) {
    for (const PendingCopy& copy : groups.front()) {
      check_access(copy.to, copy.bytes, copy.bytes, Touch::end_copy, code);
      std::memset(copy.to, 0, copy.bytes);  // what lies behind the valid bytes reads as zero
      std::memcpy(copy.to, copy.from, copy.valid_bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulated

float emulated_half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} >> 15 << 31;
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {  // subnormal: mantissa * 2^-24 is exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t emulated_float_to_half(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t sign = bits >> 31 << 15;
  const float magnitude = fabsf(value);
  if (magnitude != magnitude) return static_cast<uint16_t>(sign | 0x7fff);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x1p-14f) {  // subnormal or zero: round to a multiple of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyintf(magnitude * 0x1p24f)));
  }
  const uint32_t rounded = (bits & 0x7fffffffu) + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}
