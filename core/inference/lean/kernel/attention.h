/* Rotary positions, the key-value cache and attention over it.
 *
 * A row's keys and values lie in pages (Kwon et al., 2023), each for the same number of positions of
 * all layers: (layers, page, 2, kv_heads, head_dim), as float16 or float32.
 */
#ifndef TUNESMITH_ATTENTION_H
#define TUNESMITH_ATTENTION_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "product.h"

typedef struct {
    int32_t heads, kv_heads, head_dim, half;
    int32_t page; /* positions, a multiple of 4 */
    int32_t layer;
    float epsilon;
} Attention;

/* e^x to about one unit in the last place: 2^n times a polynomial on half a binade (Cephes). */
INLINE __m256 exp8(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
    __m256 y = _mm256_set1_ps(1.9875691500e-4f);
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.3981999507e-3f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(8.3334519073e-3f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(4.1665795894e-2f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.6666665459e-1f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(5.0000001201e-1f));
    y = _mm256_fmadd_ps(y, _mm256_mul_ps(x, x), _mm256_add_ps(x, _mm256_set1_ps(1.0f)));
    __m256i power = _mm256_slli_epi32(
        _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

INLINE float sum8(__m256 x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

/* 1 over the root mean square; `width` is a multiple of 8. */
static float inverse_norm(const float *x, int width, float epsilon) {
    __m256 squares = _mm256_setzero_ps();
    for (int i = 0; i < width; i += 8) {
        __m256 value = _mm256_loadu_ps(x + i);
        squares = _mm256_fmadd_ps(value, value, squares);
    }
    return 1.0f / sqrtf(sum8(squares) / (float)width + epsilon);
}

static void rotate(float *head, const float *cosines, const float *sines, int width) {
    for (int i = 0; i < width / 2; i++) {
        float real = head[2 * i], imaginary = head[2 * i + 1];
        head[2 * i] = real * cosines[i] - imaginary * sines[i];
        head[2 * i + 1] = real * sines[i] + imaginary * cosines[i];
    }
}

static void norm_head(float *head, const float *weight, int width, float epsilon) {
    float scale = inverse_norm(head, width, epsilon);
    for (int i = 0; i < width; i++)
        head[i] *= scale * weight[i];
}

/* Where in its page the keys of a position are. */
INLINE size_t place_of(const Attention *a, int64_t position) {
    return ((size_t)a->layer * a->page + position % a->page) * 2 * a->kv_heads * a->head_dim;
}

/* Turn a token's queries and keys to its position, and write keys and values to its row's pages. */
static void remember(const Attention *a, float *qkv, void *const *pages, int64_t position,
                     const float *cosines, const float *sines, const float *q_norm,
                     const float *k_norm) {
    int width = a->head_dim, kv_width = a->kv_heads * width;
    for (int h = 0; h < a->heads + a->kv_heads; h++) {
        const float *weight = h < a->heads ? q_norm : k_norm;
        if (weight)
            norm_head(qkv + h * width, weight, width, a->epsilon);
        rotate(qkv + h * width, cosines, sines, width);
    }
    const float *written = qkv + a->heads * width;
    void *page = pages[position / a->page];
    size_t place = place_of(a, position);
    for (int i = 0; i < 2 * kv_width; i += 8) {
        __m256 value = _mm256_loadu_ps(written + i);
        if (a->half)
            _mm_storeu_si128((__m128i *)((uint16_t *)page + place + i),
                             _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
        else
            _mm256_storeu_ps((float *)page + place + i, value);
    }
}

/* Query heads that are computed together, and how far ahead their keys and values are fetched. */
enum { TOGETHER = 3, AHEAD = 16 };

INLINE void fetch(const void *page, size_t index, int numbers, const int half) {
    const char *line = (const char *)page + index * (half ? 2 : 4);
    for (int i = 0; i < numbers * (half ? 2 : 4); i += 64)
        _mm_prefetch(line + i, _MM_HINT_T0);
}

/* Scores of some neighbouring query heads for the first positions of a page, four at a time. */
INLINE void score(const float *queries, const void *page, size_t place, size_t stride,
                  int positions, int width, float scale, const int heads, const int half,
                  float *scores, int scores_stride) {
    int p = 0;
    for (; p + 4 <= positions; p += 4) {
        __m256 sum[TOGETHER][4];
#pragma GCC unroll 3
        for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[h][j] = _mm256_setzero_ps();
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            fetch(page, place + (size_t)(p + j + AHEAD) * stride, width, half);
        for (int i = 0; i < width; i += 8)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m256 key = load8(page, place + (size_t)(p + j) * stride + i, half);
#pragma GCC unroll 3
                for (int h = 0; h < heads; h++)
                    sum[h][j] =
                        _mm256_fmadd_ps(_mm256_loadu_ps(queries + h * width + i), key, sum[h][j]);
            }
#pragma GCC unroll 3
        for (int h = 0; h < heads; h++) {
            __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sum[h][0], sum[h][1]),
                                          _mm256_hadd_ps(sum[h][2], sum[h][3]));
            __m128 all = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
            _mm_storeu_ps(scores + h * scores_stride + p, _mm_mul_ps(all, _mm_set1_ps(scale)));
        }
    }
    for (; p < positions; p++)
        for (int h = 0; h < heads; h++) {
            __m256 sum = _mm256_setzero_ps();
            for (int i = 0; i < width; i += 8)
                sum = _mm256_fmadd_ps(_mm256_loadu_ps(queries + h * width + i),
                                      load8(page, place + (size_t)p * stride + i, half), sum);
            scores[h * scores_stride + p] = sum8(sum) * scale;
        }
}

/* Turn scores into weights that sum up to 1; the array has room for a multiple of 8. */
static void soften(float *scores, int positions) {
    float most = scores[0];
    for (int p = 1; p < positions; p++)
        most = scores[p] > most ? scores[p] : most;
    int end = (positions + 7) / 8 * 8;
    for (int p = positions; p < end; p++)
        scores[p] = -INFINITY;
    __m256 total = _mm256_setzero_ps(), top = _mm256_set1_ps(most);
    for (int p = 0; p < end; p += 8) {
        __m256 value = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + p), top));
        if (p + 8 > positions) {
            _mm256_storeu_ps(scores + p, value);
            for (int q = positions; q < end; q++)
                scores[q] = 0.0f;
            value = _mm256_loadu_ps(scores + p);
        }
        total = _mm256_add_ps(total, value);
        _mm256_storeu_ps(scores + p, value);
    }
    __m256 share = _mm256_set1_ps(1.0f / sum8(total));
    for (int p = 0; p < end; p += 8)
        _mm256_storeu_ps(scores + p, _mm256_mul_ps(_mm256_loadu_ps(scores + p), share));
}

/* Add values of a page by weight, for some heads; `vectors` eights of columns stay in registers. */
INLINE void mix(const float *weights, int weights_stride, const void *page, size_t place,
                size_t stride, int positions, const int vectors, const int heads, const int half,
                float *result, int width) {
    __m256 sum[TOGETHER][4];
#pragma GCC unroll 3
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sum[h][j] = _mm256_loadu_ps(result + h * width + 8 * j);
    for (int p = 0; p < positions; p++) {
        fetch(page, place + (size_t)(p + AHEAD) * stride, 8 * vectors, half);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            __m256 value = load8(page, place + (size_t)p * stride + 8 * j, half);
#pragma GCC unroll 3
            for (int h = 0; h < heads; h++)
                sum[h][j] = _mm256_fmadd_ps(_mm256_broadcast_ss(weights + h * weights_stride + p),
                                            value, sum[h][j]);
        }
    }
#pragma GCC unroll 3
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            _mm256_storeu_ps(result + h * width + 8 * j, sum[h][j]);
}

/* What a step's attention reads and writes. */
typedef struct {
    const float *queries; /* of the first of some neighbouring heads */
    const void *const *pages;
    size_t keys, values, stride; /* the first position's in a page, and from one to the next */
    int positions, page, width;
    float *scores;
    int scores_stride;
    float *mixed;
} Heads;

INLINE int on_page(const Heads *t, int first) {
    return t->positions - first < t->page ? t->positions - first : t->page;
}

INLINE void mix_columns(const Heads *t, int column, const int vectors, const int heads,
                        const int half) {
    for (int p = 0; p < t->positions; p += t->page)
        mix(t->scores + p, t->scores_stride, t->pages[p / t->page], t->values + column, t->stride,
            on_page(t, p), vectors, heads, half, t->mixed + column, t->width);
}

INLINE void attend_as(const Heads *t, const int heads, const int half) {
    for (int p = 0; p < t->positions; p += t->page)
        score(t->queries, t->pages[p / t->page], t->keys, t->stride, on_page(t, p), t->width,
              1.0f / sqrtf((float)t->width), heads, half, t->scores + p, t->scores_stride);
    for (int h = 0; h < heads; h++)
        soften(t->scores + h * t->scores_stride, t->positions);
    memset(t->mixed, 0, sizeof(float) * heads * t->width);
    int i = 0;
    for (; i + 32 <= t->width; i += 32)
        mix_columns(t, i, 4, heads, half);
    for (; i < t->width; i += 8)
        mix_columns(t, i, 1, heads, half);
}

/* One function for each number of heads and type of cache. */
#define ATTEND(heads, half)                                                                       \
    static __attribute__((noinline)) void attend_##heads##_##half(const Heads *t) {               \
        attend_as(t, heads, half);                                                                \
    }
ATTEND(1, 0) ATTEND(2, 0) ATTEND(3, 0) ATTEND(1, 1) ATTEND(2, 1) ATTEND(3, 1)
static void (*const attends[2][TOGETHER + 1])(const Heads *) = {
    {NULL, attend_1_0, attend_2_0, attend_3_0}, {NULL, attend_1_1, attend_2_1, attend_3_1}};

/* What the query heads of one key-value head see of a row's first positions. */
static void attend(const Attention *a, const float *queries, const void *const *pages, int kv_head,
                   int positions, float *scores, int scores_stride, float *mixed) {
    int width = a->head_dim, each = a->heads / a->kv_heads;
    size_t keys = place_of(a, 0) + (size_t)kv_head * width;
    for (int first = 0; first < each; first += TOGETHER) {
        int heads = each - first < TOGETHER ? each - first : TOGETHER;
        size_t offset = (size_t)(kv_head * each + first) * width;
        Heads task = {.queries = queries + offset, .pages = pages, .keys = keys,
                      .values = keys + (size_t)a->kv_heads * width,
                      .stride = (size_t)2 * a->kv_heads * width, .positions = positions,
                      .page = a->page, .width = width, .scores = scores,
                      .scores_stride = scores_stride, .mixed = mixed + offset};
        attends[a->half][heads](&task);
    }
}

/* silu(gate) times up, in place of the gate (Shazeer, 2020). */
static void gate(float *gate_up, int width) {
    __m256 one = _mm256_set1_ps(1.0f);
    for (int i = 0; i < width; i += 8) {
        __m256 x = _mm256_loadu_ps(gate_up + i), up = _mm256_loadu_ps(gate_up + width + i);
        __m256 e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), x));
        _mm256_storeu_ps(gate_up + i, _mm256_mul_ps(_mm256_div_ps(x, _mm256_add_ps(one, e)), up));
    }
}

#endif
