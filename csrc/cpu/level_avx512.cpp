#include "vec_avx512.h"
#define GRADSAFE_KERNELS kernels_avx512
#include "level.inl"
