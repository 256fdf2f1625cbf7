#include "vec_scalar.h"
#define GRADSAFE_KERNELS kernels_scalar
#include "level.inl"
