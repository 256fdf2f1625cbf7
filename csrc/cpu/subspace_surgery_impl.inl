// A tile of surgery with a subspace. Included once per instruction set, inside its anonymous
// namespace.
//
// A segment of the tensor stays in the first cache while the vectors pass by, so each element is
// read once from memory, whatever the rank. Order of sums as in surgery_impl.inl.

// Sum of products of n elements with n others.
template <class T>
double segment_dot(const T* a, const T* b, int64_t n) {
  Vec total = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total = fma(load(a + i), load(b + i), total);
  if (i < n) {
    const int left = static_cast<int>(n - i);
    total = fma(load_first(a + i, left), load_first(b + i, left), total);
  }
  return sum(total);
}

template <class T>
void sum_subspace(const SubspaceRange& r, double* partial) {
  const T* user = static_cast<const T*>(r.user);
  const T* basis = static_cast<const T*>(r.basis);
  for (int q = 0; q <= r.rank; ++q) partial[q] = 0;
  for (int64_t begin = 0; begin < r.count; begin += kSurgerySegment) {
    const int64_t left = r.count - begin, n = left < kSurgerySegment ? left : kSurgerySegment;
    for (int j = 0; j < r.rank; ++j) {
      partial[j] += segment_dot(user + begin, basis + j * r.stride + begin, n);
    }
    partial[r.rank] += segment_dot(user + begin, user + begin, n);
  }
}

template <class T>
void merge_subspace(const SubspaceRange& r, const float* coefficients) {
  T* user = static_cast<T*>(r.user);
  const T* basis = static_cast<const T*>(r.basis);
  float merged[kSurgerySegment];  // rounded to T once, behind the last vector
  for (int64_t begin = 0; begin < r.count; begin += kSurgerySegment) {
    const int64_t left = r.count - begin, n = left < kSurgerySegment ? left : kSurgerySegment;
    const int64_t whole = n / kLanes * kLanes;
    const int rest = static_cast<int>(n - whole);
    T* const u = user + begin;
    for (int64_t i = 0; i < whole; i += kLanes) store(merged + i, load(u + i));
    if (rest > 0) store_first(merged + whole, load_first(u + whole, rest), rest);
    for (int j = 0; j < r.rank; ++j) {
      const Vec c = broadcast(coefficients[j]);
      const T* const v = basis + j * r.stride + begin;
      for (int64_t i = 0; i < whole; i += kLanes) {
        store(merged + i, fma(c, load(v + i), load(merged + i)));
      }
      if (rest > 0) {
        const Vec tail = fma(c, load_first(v + whole, rest), load_first(merged + whole, rest));
        store_first(merged + whole, tail, rest);
      }
    }
    for (int64_t i = 0; i < whole; i += kLanes) store(u + i, load(merged + i));
    if (rest > 0) store_first(u + whole, load_first(merged + whole, rest), rest);
  }
}

void subspace_sums(const SubspaceRange& range, double* partial) {
  switch (range.dtype) {
    case DType::f32: return sum_subspace<float>(range, partial);
    case DType::bf16: return sum_subspace<bf16>(range, partial);
    case DType::f16: return sum_subspace<f16>(range, partial);
    case DType::f8: return;  // a reference type only
  }
}

void subspace_merge(const SubspaceRange& range, const float* coefficients) {
  switch (range.dtype) {
    case DType::f32: return merge_subspace<float>(range, coefficients);
    case DType::bf16: return merge_subspace<bf16>(range, coefficients);
    case DType::f16: return merge_subspace<f16>(range, coefficients);
    case DType::f8: return;  // a reference type only
  }
}
