// A tile of surgery with a subspace. Included once per instruction set, inside its anonymous
// namespace.
//
// A segment of the tensor stays in the first cache while the vectors pass by, up to four at a time,
// so each element is read once from memory, whatever the rank. Order of sums as in
// surgery_impl.inl; vectors are added in their order, and their sum to the element at the end: it
// is small against the element, which is rounded once.

// Calls body with the number of vectors, as a type, and the first of them.
template <class Body>
void for_each_four(int rank, const Body& body) {
  int j = 0;
  for (; j + 4 <= rank; j += 4) body(std::integral_constant<int, 4>(), j);
  if (rank - j == 3) body(std::integral_constant<int, 3>(), j);
  if (rank - j == 2) body(std::integral_constant<int, 2>(), j);
  if (rank - j == 1) body(std::integral_constant<int, 1>(), j);
}

// Adds the dots of n elements of u with K vectors.
template <class T, int K>
void add_dots(const T* u, const T* vectors, int64_t stride, int64_t n, double* partial) {
  Vec totals[K];
  for (Vec& total : totals) total = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = load(u + i);
    for (int k = 0; k < K; ++k) totals[k] = fma(x, load(vectors + k * stride + i), totals[k]);
  }
  if (i < n) {
    const int left = static_cast<int>(n - i);
    const Vec x = load_first(u + i, left);
    for (int k = 0; k < K; ++k) {
      totals[k] = fma(x, load_first(vectors + k * stride + i, left), totals[k]);
    }
  }
  for (int k = 0; k < K; ++k) partial[k] += sum(totals[k]);
}

// Adds K vectors to n sums.
template <class T, int K>
void add_vectors(float* sums, const T* vectors, int64_t stride, int64_t n,
                 const float* coefficients) {
  Vec c[K];
  for (int k = 0; k < K; ++k) c[k] = broadcast(coefficients[k]);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec x = load(sums + i);
    for (int k = 0; k < K; ++k) x = fma(c[k], load(vectors + k * stride + i), x);
    store(sums + i, x);
  }
  if (i < n) {
    const int left = static_cast<int>(n - i);
    Vec x = load_first(sums + i, left);
    for (int k = 0; k < K; ++k) x = fma(c[k], load_first(vectors + k * stride + i, left), x);
    store_first(sums + i, x, left);
  }
}

// Adds n sums to as many elements.
template <class T>
void add_sums(T* u, const float* sums, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(u + i, add(load(u + i), load(sums + i)));
  const int left = static_cast<int>(n - i);
  if (left > 0) store_first(u + i, add(load_first(u + i, left), load_first(sums + i, left)), left);
}

template <class T>
void sum_subspace(const SubspaceRange& r, double* partial) {
  const T* user = static_cast<const T*>(r.user);
  const T* basis = static_cast<const T*>(r.basis);
  for (int q = 0; q <= r.rank; ++q) partial[q] = 0;
  for (int64_t begin = 0; begin < r.count; begin += kSurgerySegment) {
    const int64_t left = r.count - begin, n = left < kSurgerySegment ? left : kSurgerySegment;
    const T* const u = user + begin;
    for_each_four(r.rank, [&](auto count, int j) {
      add_dots<T, count>(u, basis + j * r.stride + begin, r.stride, n, partial + j);
    });
    add_dots<T, 1>(u, u, 0, n, partial + r.rank);
  }
}

template <class T>
void merge_subspace(const SubspaceRange& r, const float* coefficients) {
  T* user = static_cast<T*>(r.user);
  const T* basis = static_cast<const T*>(r.basis);
  float sums[kSurgerySegment];
  for (int64_t begin = 0; begin < r.count; begin += kSurgerySegment) {
    const int64_t left = r.count - begin, n = left < kSurgerySegment ? left : kSurgerySegment;
    for (int64_t i = 0; i < n; ++i) sums[i] = 0;
    for_each_four(r.rank, [&](auto count, int j) {
      add_vectors<T, count>(sums, basis + j * r.stride + begin, r.stride, n, coefficients + j);
    });
    add_sums(user + begin, sums, n);
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
