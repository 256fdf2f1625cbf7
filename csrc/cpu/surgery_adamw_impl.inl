// A tile of surgery and AdamW in one pass. Included once per instruction set, inside its anonymous
// namespace. Everything between load and store is float32; 16-bit states are rounded once.

struct AdamwVectors {
  Vec coefficient, decay, rate1, beta2, rate2, step_size, inv_sqrt, eps;

  AdamwVectors(float c, const AdamwScalars& s)
      : coefficient(broadcast(c)),
        decay(broadcast(s.decay)),
        rate1(broadcast(s.rate1)),
        beta2(broadcast(s.beta2)),
        rate2(broadcast(s.rate2)),
        step_size(broadcast(-s.step_size)),
        inv_sqrt(broadcast(s.inv_sqrt)),
        eps(broadcast(s.eps)) {}

  inline void update(Vec u, Vec a, Vec& p, Vec& m, Vec& v) const {
    const Vec g = fma(coefficient, a, u);
    m = fma(rate1, sub(g, m), m);
    v = fma(rate2, mul(g, g), mul(beta2, v));
    const Vec denominator = fma(root(v), inv_sqrt, eps);
    p = fma(step_size, div(m, denominator), fma(decay, p, p));
  }
};

template <class T>
void adamw_range(const SurgeryAdamwRange& r, float coefficient, const AdamwScalars& scalars) {
  const T* user = static_cast<const T*>(r.pair.user);
  const T* align = static_cast<const T*>(r.pair.align);
  T* param = static_cast<T*>(r.param);
  T* exp_avg = static_cast<T*>(r.exp_avg);
  T* exp_avg_sq = static_cast<T*>(r.exp_avg_sq);
  const AdamwVectors adamw(coefficient, scalars);
  int64_t i = 0;
  for (; i + kLanes <= r.pair.count; i += kLanes) {
    Vec p = load(param + i), m = load(exp_avg + i), v = load(exp_avg_sq + i);
    adamw.update(load(user + i), load(align + i), p, m, v);
    store(param + i, p);
    store(exp_avg + i, m);
    store(exp_avg_sq + i, v);
  }
  if (i == r.pair.count) return;
  const int n = static_cast<int>(r.pair.count - i);
  Vec p = load_first(param + i, n), m = load_first(exp_avg + i, n);
  Vec v = load_first(exp_avg_sq + i, n);
  adamw.update(load_first(user + i, n), load_first(align + i, n), p, m, v);
  store_first(param + i, p, n);
  store_first(exp_avg + i, m, n);
  store_first(exp_avg_sq + i, v, n);
}

void surgery_adamw(const SurgeryAdamwRange& range, float coefficient,
                   const AdamwScalars& scalars) {
  switch (range.pair.dtype) {
    case DType::f32: return adamw_range<float>(range, coefficient, scalars);
    case DType::bf16: return adamw_range<bf16>(range, coefficient, scalars);
    case DType::f16: return adamw_range<f16>(range, coefficient, scalars);
    case DType::f8: return;  // a reference type only
  }
}
