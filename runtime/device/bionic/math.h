#ifndef GFRT_BIONIC_MATH_H
#define GFRT_BIONIC_MATH_H

#define isfinite(x) __builtin_isfinite(x)

#endif
