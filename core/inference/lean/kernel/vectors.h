/* Operations on vectors of LANES numbers, by one name in either width.
 *
 * A template is written with these names and included once for each width: LANES is defined as 8 or
 * 16, this file says what the names are then, and the template follows. NAMED gives the functions of
 * the wider one names of their own.
 */
#ifndef TUNESMITH_VECTORS_H
#define TUNESMITH_VECTORS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define AVX512 __attribute__((target("avx512f")))

INLINE __m256 load8(const void *data, size_t index, int half) {
    return half ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)data + index)))
                : _mm256_loadu_ps((const float *)data + index);
}

AVX512 INLINE __m512 load16(const void *data, size_t index, int half) {
    const uint16_t *halves = (const uint16_t *)data + index;
    return half ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves))
                : _mm512_loadu_ps((const float *)data + index);
}

AVX512 INLINE __m512 broadcast16(const float *number) { return _mm512_set1_ps(*number); }

#endif

#undef VECTOR
#undef TARGET
#undef NAMED
#undef ZERO
#undef LOAD
#undef LOAD_FLOATS
#undef BROADCAST
#undef FMADD
#undef STORE

#if LANES == 8
#define VECTOR __m256
#define TARGET
#define NAMED(name) name
#define ZERO _mm256_setzero_ps
#define LOAD load8
#define LOAD_FLOATS _mm256_loadu_ps
#define BROADCAST _mm256_broadcast_ss
#define FMADD _mm256_fmadd_ps
#define STORE _mm256_storeu_ps
#else
#define VECTOR __m512
#define TARGET AVX512
#define NAMED(name) name##_512
#define ZERO _mm512_setzero_ps
#define LOAD load16
#define LOAD_FLOATS _mm512_loadu_ps
#define BROADCAST broadcast16
#define FMADD _mm512_fmadd_ps
#define STORE _mm512_storeu_ps
#endif
