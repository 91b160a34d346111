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

/* Query heads that are computed together, and how far ahead their keys and values are fetched. */
enum { TOGETHER = 3, AHEAD = 16 };

typedef struct Heads Heads;
typedef void (*Attend)(const Heads *);

typedef struct {
    int32_t heads, kv_heads, head_dim, half;
    int32_t page; /* positions, a multiple of 4 */
    int32_t layer;
    float epsilon;
    const Attend *attends; /* by how many heads are computed together */
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

INLINE float greatest8(__m256 x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
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

INLINE void fetch(const void *page, size_t index, int numbers, const int half) {
    const char *line = (const char *)page + index * (half ? 2 : 4);
    for (int i = 0; i < numbers * (half ? 2 : 4); i += 64)
        _mm_prefetch(line + i, _MM_HINT_T0);
}

/* The score of one query head for one position, before it is scaled. */
INLINE float score_one(const float *query, const void *page, size_t place, int width,
                       const int half) {
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < width; i += 8)
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(query + i), load8(page, place + i, half), sum);
    return sum8(sum);
}

/* Turn scores into weights that sum up to 1; the array has room for a multiple of 8. */
static void soften(float *scores, int positions) {
    int end = (positions + 7) / 8 * 8;
    for (int p = positions; p < end; p++)
        scores[p] = -INFINITY;
    __m256 most = _mm256_loadu_ps(scores);
    for (int p = 8; p < end; p += 8)
        most = _mm256_max_ps(_mm256_loadu_ps(scores + p), most);
    __m256 total = _mm256_setzero_ps(), top = _mm256_set1_ps(greatest8(most));
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

/* What the attention of some neighbouring query heads reads and writes. */
struct Heads {
    const float *queries; /* of the first one */
    const void *const *pages;
    size_t keys, values, stride; /* the first position's in a page, and from one to the next */
    int positions, page, width;
    float *scores;
    int scores_stride;
    float *mixed;
};

INLINE int on_page(const Heads *t, int first) {
    return t->positions - first < t->page ? t->positions - first : t->page;
}

AVX512 INLINE __m512 side_by_side(__m256 low, __m256 high) {
    return _mm512_castpd_ps(_mm512_insertf64x4(
        _mm512_castps_pd(_mm512_castps256_ps512(low)), _mm256_castps_pd(high), 1));
}

/* How eight numbers of neighbouring positions lie in one vector: those of one position, */
INLINE __m256 load_keys(const void *page, size_t place, size_t stride, int half) {
    (void)stride;
    return load8(page, place, half);
}

INLINE __m256 load_query(const float *numbers) { return _mm256_loadu_ps(numbers); }

INLINE __m256 eight_of(__m256 sums, int which) {
    (void)which;
    return sums;
}

/* and those of two. */
AVX512 INLINE __m512 load_keys_512(const void *page, size_t place, size_t stride, int half) {
    if (!half)
        return side_by_side(load8(page, place, 0), load8(page, place + stride, 0));
    const __m128i *low = (const __m128i *)((const uint16_t *)page + place);
    const __m128i *high = (const __m128i *)((const uint16_t *)page + place + stride);
    return _mm512_cvtph_ps(_mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1));
}

AVX512 INLINE __m512 load_query_512(const float *numbers) {
    return _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(numbers))));
}

AVX512 INLINE __m256 eight_of_512(__m512 sums, int which) {
    __m512d both = _mm512_castps_pd(sums);
    return which ? _mm256_castpd_ps(_mm512_extractf64x4_pd(both, 1)) : _mm512_castps512_ps256(sums);
}

/* `attend`, in registers of eight numbers, */
#define LANES 8
#include "vectors.h"
#include "heads.h"
#undef LANES

/* and `attend_512`, in registers of twice the width, of which there are twice as many. */
#define LANES 16
#include "vectors.h"
#include "heads.h"
#undef LANES

/* One function for each number of heads and type of cache. */
#define ATTEND(heads, half)                                                                       \
    static __attribute__((noinline)) void attend_##heads##_##half(const Heads *t) {               \
        attend(t, heads, half);                                                                   \
    }                                                                                             \
    static AVX512 __attribute__((noinline)) void attend_512_##heads##_##half(const Heads *t) {    \
        attend_512(t, heads, half);                                                               \
    }
ATTEND(1, 0) ATTEND(2, 0) ATTEND(3, 0) ATTEND(1, 1) ATTEND(2, 1) ATTEND(3, 1)

/* By half and heads. */
static const Attend attends_256[2][TOGETHER + 1] = {
    {NULL, attend_1_0, attend_2_0, attend_3_0}, {NULL, attend_1_1, attend_2_1, attend_3_1}};
static const Attend attends_512[2][TOGETHER + 1] = {
    {NULL, attend_512_1_0, attend_512_2_0, attend_512_3_0},
    {NULL, attend_512_1_1, attend_512_2_1, attend_512_3_1}};

/* Those for a kind of cache, heads of a width, and vectors of so many bits. */
static const Attend *attends_for(int half, int width, int bits) {
    return bits == 512 && width % 16 == 0 ? attends_512[half] : attends_256[half];
}

/* What the query heads of one key-value head see of a row's first positions. */
static void see(const Attention *a, const float *queries, const void *const *pages, int kv_head,
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
        a->attends[heads](&task);
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
