/* Matrices into panels. */
#ifndef TUNESMITH_PACK_H
#define TUNESMITH_PACK_H

#include <math.h>
#include <string.h>

#include "product.h"
#include "threads.h"

/* Some outputs of a matrix: value (k, c) is data[order[c], k] x scale[k] x factor. */
typedef struct {
    const float *data; /* NULL: zeros */
    int64_t stride;    /* from output to output */
    const float *scale;   /* NULL: 1 */
    const int64_t *order; /* NULL: as they are */
    float factor;
    int32_t outputs;
} Source;

/* A matrix whose memory is there, and what its outputs come from, side by side. */
typedef struct {
    Matrix *matrix;
    const Source *sources;
    int32_t count;
} Packing;

typedef struct {
    const Packing *packings;
    int32_t count;
} Packings;

static const float *output_of(const Source *s, int32_t column) {
    return s->data + (s->order ? s->order[column] : column) * s->stride;
}

/* The power of two that no value reaches. */
static float find_factor(const Source *sources, int32_t count, int32_t inputs) {
    __m256 most = _mm256_setzero_ps(), sign = _mm256_set1_ps(-0.0f);
    float rest = 0.0f;
    for (const Source *s = sources; s < sources + count; s++)
        for (int32_t c = 0; s->data && c < s->outputs; c++) {
            const float *from = output_of(s, c);
            int k = 0;
            for (; k + 8 <= inputs; k += 8) {
                __m256 value = _mm256_mul_ps(_mm256_loadu_ps(from + k), _mm256_set1_ps(s->factor));
                if (s->scale)
                    value = _mm256_mul_ps(value, _mm256_loadu_ps(s->scale + k));
                most = _mm256_max_ps(most, _mm256_andnot_ps(sign, value));
            }
            for (; k < inputs; k++)
                rest = fmaxf(rest, fabsf(from[k] * s->factor * (s->scale ? s->scale[k] : 1.0f)));
        }
    float values[8];
    _mm256_storeu_ps(values, most);
    for (int i = 0; i < 8; i++)
        rest = fmaxf(rest, values[i]);
    int exponent = 0;
    if (rest > 0.0f && isfinite(rest))
        frexpf(rest, &exponent);
    return ldexpf(1.0f, exponent);
}

/* Rows become columns. */
INLINE void transpose8(__m256 row[8]) {
    __m256 pair[8], four[8];
    for (int i = 0; i < 4; i++) {
        pair[2 * i] = _mm256_unpacklo_ps(row[2 * i], row[2 * i + 1]);
        pair[2 * i + 1] = _mm256_unpackhi_ps(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) {
            four[4 * i + 2 * j] = _mm256_shuffle_ps(pair[4 * i + j], pair[4 * i + j + 2], 0x44);
            four[4 * i + 2 * j + 1] = _mm256_shuffle_ps(pair[4 * i + j], pair[4 * i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        row[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
        row[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
    }
}

INLINE void put8(void *target, size_t index, __m256 values, int half) {
    if (half)
        _mm_storeu_si128((__m128i *)((uint16_t *)target + index),
                         _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    else
        _mm256_storeu_ps((float *)target + index, values);
}

/* Eight outputs of a panel: from[i][k] x factor[i] x scale[i][k]; NULL: zeros. */
static void pack8(const float *const *from, const float *factor, const float *const *scale,
                  int32_t inputs, int32_t half, void *target, size_t place) {
    int k = 0;
    for (; k + 8 <= inputs; k += 8) {
        __m256 rows[8];
        for (int i = 0; i < 8; i++) {
            rows[i] = _mm256_setzero_ps();
            if (from[i])
                rows[i] = _mm256_mul_ps(_mm256_loadu_ps(from[i] + k), _mm256_set1_ps(factor[i]));
            if (from[i] && scale[i])
                rows[i] = _mm256_mul_ps(rows[i], _mm256_loadu_ps(scale[i] + k));
        }
        transpose8(rows);
        for (int i = 0; i < 8; i++)
            put8(target, place + (size_t)(k + i) * PANEL, rows[i], half);
    }
    for (; k < inputs; k++) {
        float values[8];
        for (int i = 0; i < 8; i++)
            values[i] = from[i] ? from[i][k] * factor[i] * (scale[i] ? scale[i][k] : 1.0f) : 0.0f;
        put8(target, place + (size_t)k * PANEL, _mm256_loadu_ps(values), half);
    }
}

/* Fill a matrix's panels, and find what their numbers are to be multiplied by. */
static void pack(const Packing *packing) {
    Matrix *m = packing->matrix;
    const Source *s = packing->sources, *end = s + packing->count;
    m->factor = m->half ? find_factor(s, packing->count, m->in) : 1.0f;
    int32_t column = 0; /* of s */
    for (size_t place = 0; s < end; place += (size_t)m->in * PANEL)
        for (int first = 0; first < PANEL; first += 8) {
            const float *from[8] = {NULL}, *scale[8] = {NULL};
            float own[8] = {0};
            for (int lane = 0; lane < 8 && s < end; lane++) {
                if (s->data) {
                    from[lane] = output_of(s, column);
                    scale[lane] = s->scale;
                    own[lane] = s->factor / m->factor;
                }
                if (++column == s->outputs)
                    s++, column = 0;
            }
            pack8(from, own, scale, m->in, m->half, (void *)m->data, place + first);
        }
}

static void pack_in_turn(Team *team, int member, void *argument) {
    const Packings *given = argument;
    int done = 0;
    for (int i; (i = next_task(team, 0)) < given->count; done++)
        pack(given->packings + i);
    end_phase(team, member, 0, done, given->count);
}

/* Pack matrices, several at a time where the system gives threads for that. */
void tunesmith_pack(const Packing *packings, int32_t count, int32_t threads) {
    Packings given = {packings, count};
    Team *team = threads > 1 && count > 1 ? make_team(threads, 1) : NULL;
    if (team) {
        run_together(team, pack_in_turn, &given);
        end_team(team);
    } else
        for (int32_t i = 0; i < count; i++)
            pack(packings + i);
}

#endif
