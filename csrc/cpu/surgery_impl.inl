// A tile of gradient surgery. Included once per instruction set, inside its anonymous namespace.
//
// Order of sums (fixed, whatever the thread count): within kSurgerySegment elements sixteen float32
// lanes each add every sixteenth product; a segment's lanes are folded in float64.

constexpr int64_t kSurgerySegment = 1024;

struct ConflictSums {
  Vec dot = zero(), sq_user = zero(), sq_align = zero();

  inline void add_products(Vec u, Vec a) {
    dot = fma(u, a, dot);
    sq_user = fma(u, u, sq_user);
    sq_align = fma(a, a, sq_align);
  }
};

template <class T>
void sum_range(const SurgeryRange& r, double* partial) {
  const T* user = static_cast<const T*>(r.user);
  const T* align = static_cast<const T*>(r.align);
  double totals[kSurgerySums] = {};
  for (int64_t begin = 0; begin < r.count; begin += kSurgerySegment) {
    const int64_t left = r.count - begin;
    const int64_t end = begin + (left < kSurgerySegment ? left : kSurgerySegment);
    ConflictSums sums;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) sums.add_products(load(user + i), load(align + i));
    if (i < end) {
      const int n = static_cast<int>(end - i);
      sums.add_products(load_first(user + i, n), load_first(align + i, n));
    }
    totals[kDot] += sum(sums.dot);
    totals[kSqUser] += sum(sums.sq_user);
    totals[kSqAlign] += sum(sums.sq_align);
  }
  for (int q = 0; q < kSurgerySums; ++q) partial[q] = totals[q];
}

template <class T>
void merge_range(const SurgeryRange& r, float coefficient) {
  T* user = static_cast<T*>(r.user);
  const T* align = static_cast<const T*>(r.align);
  const Vec c = broadcast(coefficient);
  int64_t i = 0;
  for (; i + kLanes <= r.count; i += kLanes) {
    store(user + i, fma(c, load(align + i), load(user + i)));
  }
  if (i == r.count) return;
  const int n = static_cast<int>(r.count - i);
  store_first(user + i, fma(c, load_first(align + i, n), load_first(user + i, n)), n);
}

void surgery_sums(const SurgeryRange& range, double* partial) {
  switch (range.dtype) {
    case DType::f32: return sum_range<float>(range, partial);
    case DType::bf16: return sum_range<bf16>(range, partial);
    case DType::f16: return sum_range<f16>(range, partial);
    case DType::f8: return;  // a reference type only
  }
}

void surgery_merge(const SurgeryRange& range, float coefficient) {
  switch (range.dtype) {
    case DType::f32: return merge_range<float>(range, coefficient);
    case DType::bf16: return merge_range<bf16>(range, coefficient);
    case DType::f16: return merge_range<f16>(range, coefficient);
    case DType::f8: return;  // a reference type only
  }
}
