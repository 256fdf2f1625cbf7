// Sums and gradient of one segment of a row of logits. Included once per instruction set, inside its
// anonymous namespace.

template <class S, class T>
struct KlRow {
  // Sixteen logits of both rows; lanes behind the n-th hold -inf, which adds nothing.
  struct Pair {
    Vec student, teacher;
  };
  template <bool kPart>
  static inline Pair read(const KlSegment& a, int64_t c, int n) {
    const S* student = static_cast<const S*>(a.student) + c;
    const T* teacher = static_cast<const T*>(a.teacher) + c;
    if (!kPart) return {load(student), load(teacher)};
    const float nothing = -__builtin_inff();
    return {pad(load_first(student, n), n, nothing), pad(load_first(teacher, n), n, nothing)};
  }

  template <class Body, class Tail>
  static inline void walk(int64_t count, const Body& body, const Tail& tail) {
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) body(c);
    if (c < count) tail(c, static_cast<int>(count - c));
  }

  static void sums(const KlSegment& a, KlMaxima* maxima, KlSums* out) {
    Vec student_max = broadcast(maxima->student), teacher_max = broadcast(maxima->teacher);
    const auto find = [&](Pair at) {
      student_max = max(at.student, student_max);
      teacher_max = max(at.teacher, teacher_max);
    };
    walk(a.count, [&](int64_t c) { find(read<false>(a, c, kLanes)); },
         [&](int64_t c, int n) { find(read<true>(a, c, n)); });
    maxima->student = largest(student_max);
    maxima->teacher = largest(teacher_max);

    student_max = broadcast(maxima->student);
    teacher_max = broadcast(maxima->teacher);
    Vec student = zero(), teacher = zero(), cross = zero();
    const auto accumulate = [&](Pair at) {
      const Vec s = sub(at.student, student_max), t = sub(at.teacher, teacher_max);
      const Vec e = exp_nonpositive(t);
      student = add(student, exp_nonpositive(s));
      teacher = add(teacher, e);
      // 0 * (-inf - s) and 0 * (t + inf) are 0 here: what has no probability has no share.
      cross = add(cross, zero_if_zero(e, mul(e, sub(t, s))));
    };
    walk(a.count, [&](int64_t c) { accumulate(read<false>(a, c, kLanes)); },
         [&](int64_t c, int n) { accumulate(read<true>(a, c, n)); });
    out->student = sum(student);
    out->teacher = sum(teacher);
    out->cross = sum(cross);
  }

  static void gradient(const KlSegment& a, const KlScales& by, void* buffer) {
    S* out = static_cast<S*>(buffer);
    const Vec student_max = broadcast(by.maxima.student), teacher_max = broadcast(by.maxima.teacher);
    const Vec student_scale = broadcast(by.student), teacher_scale = broadcast(by.teacher);
    const Vec weight = broadcast(by.weight);
    const auto value = [&](Pair at) {
      // Two products and a difference, never fused: equal logits must give exactly 0.
      const Vec student = mul(exp_nonpositive(sub(at.student, student_max)), student_scale);
      const Vec teacher = mul(exp_nonpositive(sub(at.teacher, teacher_max)), teacher_scale);
      return mul(weight, sub(student, teacher));
    };
    walk(a.count, [&](int64_t c) { store(out + c, value(read<false>(a, c, kLanes))); },
         [&](int64_t c, int n) { store_first(out + c, value(read<true>(a, c, n)), n); });
  }
};

template <class S>
void kl_sums_by_teacher(const KlSegment& a, KlMaxima* maxima, KlSums* out) {
  switch (a.teacher_dtype) {
    case DType::f32: return KlRow<S, float>::sums(a, maxima, out);
    case DType::bf16: return KlRow<S, bf16>::sums(a, maxima, out);
    case DType::f16: return KlRow<S, f16>::sums(a, maxima, out);
    case DType::f8: return;  // a reference type only
  }
}

void kl_sums(const KlSegment& a, KlMaxima* maxima, KlSums* out) {
  switch (a.student_dtype) {
    case DType::f32: return kl_sums_by_teacher<float>(a, maxima, out);
    case DType::bf16: return kl_sums_by_teacher<bf16>(a, maxima, out);
    case DType::f16: return kl_sums_by_teacher<f16>(a, maxima, out);
    case DType::f8: return;  // a reference type only
  }
}

template <class S>
void kl_gradient_by_teacher(const KlSegment& a, const KlScales& by, void* out) {
  switch (a.teacher_dtype) {
    case DType::f32: return KlRow<S, float>::gradient(a, by, out);
    case DType::bf16: return KlRow<S, bf16>::gradient(a, by, out);
    case DType::f16: return KlRow<S, f16>::gradient(a, by, out);
    case DType::f8: return;  // a reference type only
  }
}

void kl_gradient(const KlSegment& a, const KlScales& by, void* out) {
  switch (a.student_dtype) {
    case DType::f32: return kl_gradient_by_teacher<float>(a, by, out);
    case DType::bf16: return kl_gradient_by_teacher<bf16>(a, by, out);
    case DType::f16: return kl_gradient_by_teacher<f16>(a, by, out);
    case DType::f8: return;  // a reference type only
  }
}
