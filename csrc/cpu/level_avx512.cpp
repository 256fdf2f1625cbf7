#include "vec_avx512.h"
#define GRADSAFE_PAIRS "wgrad_pairs_avx512.inl"
#define GRADSAFE_COSINE_PAIRS "cosine_pairs_avx512.inl"
#define GRADSAFE_COSINE_ROWS "cosine_rows_avx512.inl"
#define GRADSAFE_KERNELS kernels_avx512
#include "level.inl"
