#include "vec_avx2.h"
#define GRADSAFE_KERNELS kernels_avx2
#include "level.inl"
