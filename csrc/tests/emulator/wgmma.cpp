// Products of a warpgroup, with both operands in shared memory.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "../emulated_hopper.h"
#include "access.h"
#include "grid.h"

namespace emulated {
namespace {

constexpr int kM = 64, kN = 128, kK = 16;
constexpr int kBorder = 64;  // columns that lie together
constexpr unsigned kSums = 64;

struct Part {  // of a thread
  const Wgmma* product;
  float* sums;
  float values[kSums];
};

bool is_same(const Wgmma& p, const Wgmma& q) {
  return p.a == q.a && p.b == q.b && p.step == q.step && p.steps == q.steps && p.add == q.add;
}

// PTX ISA, "Asynchronous warpgroup level matrix shared memory layout": a matrix descriptor.
struct Operand {
  uint32_t start, next_columns, next_rows;

  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4), next_columns((descriptor >> 16 & 0x3fff) << 4),
        next_rows((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
      fail("wgmma", "only operands with 128-byte swizzle and base offset 0 are emulated");
    }
  }
  // Of the 64 columns from `col` on, before swizzling.
  uint32_t row(int k, int col) const {
    return start + static_cast<uint32_t>(col / kBorder) * next_columns +
           static_cast<uint32_t>(k / 8) * next_rows + static_cast<uint32_t>(k % 8) * kBorder * 2;
  }
};

template <int kCols>
void load(uint64_t descriptor, float (*widen)(uint16_t), unsigned actor, const void* code,
          float (&to)[kK][kCols]) {
  const Operand operand(descriptor);
  for (int k = 0; k < kK; ++k) {
    for (int first = 0; first < kCols; first += kBorder) {
      const uint32_t row = operand.row(k, first);
      // The eight chunks of a row keep to its 128 bytes.
      check_access_of(actor, shared_pointer(row & ~127u), kBorder * 2, 1, Touch::async_read, code);
      for (int col = 0; col < kBorder; col += 8) {
        uint16_t bits[8];
        std::memcpy(bits, shared_pointer(swizzled(row + static_cast<uint32_t>(col) * 2)), 16);
        for (int i = 0; i < 8; ++i) to[k][first + col + i] = widen(bits[i]);
      }
    }
  }
}

// Row and column of element e of thread t.
int row_of(unsigned t, unsigned e) {
  return static_cast<int>(t / 32 * 16 + e / 2 % 2 * 8 + t % 32 / 4);
}
int col_of(unsigned t, unsigned e) { return static_cast<int>(e / 4 * 8 + t % 4 * 2 + e % 2); }

// Products are exact, and each step rounds a sum once.
void multiply(const float (&a)[kK][kM], const float (&b)[kK][kN], float (&c)[kM][kN]) {
  for (int m = 0; m < kM; ++m) {
    double sums[kN];
    for (int n = 0; n < kN; ++n) sums[n] = c[m][n];
    for (int k = 0; k < kK; ++k) {
      const double factor = a[k][m];
      for (int n = 0; n < kN; ++n) sums[n] += factor * b[k][n];
    }
    for (int n = 0; n < kN; ++n) c[m][n] = static_cast<float>(sums[n]);
  }
}

void run(unsigned first, unsigned group, const void* code) {
  Clocks& clocks = block().clocks;
  const unsigned actor = clocks.warpgroup(group);
  clocks.meet(group);
  ++clocks.at(actor, actor);
  static float a[kK][kM], b[kK][kN], c[kM][kN];
  const auto part = [&](unsigned t) { return static_cast<Part*>(thread(first + t)->data); };
  const Wgmma& product = *part(0)->product;
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    for (unsigned e = 0; e < kSums; ++e) {
      c[row_of(t, e)][col_of(t, e)] = product.add ? part(t)->values[e] : 0;
    }
  }
  for (int step = 0; step < product.steps; ++step) {
    const uint64_t further = static_cast<uint64_t>(step) * product.step;
    load(product.a + further, product.widen, actor, code, a);
    load(product.b + further, product.widen, actor, code, b);
    multiply(a, b, c);
  }
  for (unsigned t = 0; t < kWarpgroup; ++t) {
    for (unsigned e = 0; e < kSums; ++e) part(t)->values[e] = c[row_of(t, e)][col_of(t, e)];
  }
}

}  // namespace

void wgmma_m64n128k16(float* sums, const Wgmma& product, Site site) {
  Thread& self = *running();
  const unsigned group = self.number / kWarpgroup, first = group * kWarpgroup;
  if (!block().clocks.is_wide()) block().clocks.widen();
  Part part{&product, sums, {}};
  // Products in flight may be added to without a wait.
  const float* from = sums;
  for (const PendingProduct& p : self.products) {
    if (p.sums == sums) from = p.values;
  }
  std::copy_n(from, kSums, part.values);
  self.collective = "wgmma";
  self.data = &part;
  self.site = site;
  unsigned arrived = 0;
  for (unsigned t = first; t < first + kWarpgroup; ++t) {
    const Thread* other = thread(t);
    if (!other) fail("warpgroup", "wgmma needs whole warpgroups of 128 threads");
    arrived += other->state == State::at_warpgroup;
  }
  if (arrived + 1 < kWarpgroup) {
    wait(State::at_warpgroup);
  } else {
    for (unsigned t = first; t < first + kWarpgroup; ++t) {
      const Thread& other = *thread(t);
      if (other.site.line != site.line ||
          !is_same(product, *static_cast<Part*>(other.data)->product)) {
        fail("warpgroup", "wgmma at " + site_text(site) + ": thread " + std::to_string(t) +
                              " calls it at " + site_text(other.site) + " or with other operands");
      }
    }
    run(first, group, __builtin_return_address(0));
    for (unsigned t = first; t < first + kWarpgroup; ++t) {
      if (t != self.number) set_ready(*thread(t));
    }
  }
  ++self.products_issued;
  self.products.emplace_back();
  self.products.back().sums = sums;
  std::copy_n(part.values, kSums, self.products.back().values);
  std::fill_n(sums, kSums, std::numeric_limits<float>::quiet_NaN());
}

void wgmma_wait(unsigned groups_in_flight, Site site) {
  warp_collective("wgmma_wait", ~0u, nullptr, nullptr, site);
  Thread& self = *running();
  auto& products = self.products;
  while (products.size() > groups_in_flight) {
    const PendingProduct& done = products.front();
    const auto later = [&](const PendingProduct& p) { return p.sums == done.sums; };
    if (std::none_of(products.begin() + 1, products.end(), later)) {
      std::copy_n(done.values, kSums, done.sums);
    }
    products.erase(products.begin());
  }
  if (self.products_issued == 0) return;
  // The group's reads are over: whoever sees this thread may overwrite the operands.
  Clocks& clocks = block().clocks;
  uint32_t& seen = clocks.at(self.number, clocks.warpgroup(self.number / kWarpgroup));
  seen = std::max<uint32_t>(seen, self.products_issued - static_cast<uint32_t>(products.size()));
}

}  // namespace emulated
