/* Attention of neighbouring query heads over the pages of a row.
 *
 * `attention.h` includes this once for each width of vectors (`vectors.h`), and says how eight
 * numbers of neighbouring positions lie in one vector. A score is the sum of the same eights in any
 * width, and a result the sum over the positions in their order.
 */

/* Scores of the heads for the first positions of a page, four at a time. */
TARGET INLINE void NAMED(score)(const Heads *t, const void *page, int positions, const int heads,
                                const int half, float *scores) {
    enum { AT_ONCE = LANES / 8, VECTORS = 4 / AT_ONCE };
    const float scale = 1.0f / sqrtf((float)t->width);
    int p = 0;
    for (; p + 4 <= positions; p += 4) {
        VECTOR sum[TOGETHER][VECTORS];
        const size_t place = t->keys + (size_t)p * t->stride;
#pragma GCC unroll 3
        for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++)
                sum[h][j] = ZERO();
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            fetch(page, place + (j + AHEAD) * t->stride, t->width, half);
        for (int i = 0; i < t->width; i += 8)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) {
                VECTOR keys = NAMED(load_keys)(page, place + j * AT_ONCE * t->stride + i,
                                               t->stride, half);
#pragma GCC unroll 3
                for (int h = 0; h < heads; h++)
                    sum[h][j] = FMADD(NAMED(load_query)(t->queries + h * t->width + i), keys,
                                      sum[h][j]);
            }
#pragma GCC unroll 3
        for (int h = 0; h < heads; h++) {
            __m256 eight[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                eight[j] = NAMED(eight_of)(sum[h][j / AT_ONCE], j % AT_ONCE);
            __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(eight[0], eight[1]),
                                          _mm256_hadd_ps(eight[2], eight[3]));
            __m128 all = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
            _mm_storeu_ps(scores + h * t->scores_stride + p, _mm_mul_ps(all, _mm_set1_ps(scale)));
        }
    }
    for (; p < positions; p++)
        for (int h = 0; h < heads; h++)
            scores[h * t->scores_stride + p] =
                scale * score_one(t->queries + h * t->width, page,
                                  t->keys + (size_t)p * t->stride, t->width, half);
}

/* Add the values of a page by weight; `vectors` of columns stay in registers. */
TARGET INLINE void NAMED(mix)(const Heads *t, const void *page, int positions, int column,
                              const int vectors, const int heads, const int half,
                              const float *weights) {
    VECTOR sum[TOGETHER][4];
#pragma GCC unroll 3
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sum[h][j] = LOAD_FLOATS(t->mixed + h * t->width + column + LANES * j);
    size_t place = t->values + column;
    for (int p = 0; p < positions; p++, place += t->stride) {
        fetch(page, place + AHEAD * t->stride, LANES * vectors, half);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            VECTOR value = LOAD(page, place + LANES * j, half);
#pragma GCC unroll 3
            for (int h = 0; h < heads; h++)
                sum[h][j] = FMADD(BROADCAST(weights + h * t->scores_stride + p), value, sum[h][j]);
        }
    }
#pragma GCC unroll 3
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            STORE(t->mixed + h * t->width + column + LANES * j, sum[h][j]);
}

TARGET INLINE void NAMED(mix_columns)(const Heads *t, int column, const int vectors,
                                      const int heads, const int half) {
    for (int p = 0; p < t->positions; p += t->page)
        NAMED(mix)(t, t->pages[p / t->page], on_page(t, p), column, vectors, heads, half,
                   t->scores + p);
}

/* The width is a multiple of LANES. */
TARGET INLINE void NAMED(attend)(const Heads *t, const int heads, const int half) {
    for (int p = 0; p < t->positions; p += t->page)
        NAMED(score)(t, t->pages[p / t->page], on_page(t, p), heads, half, t->scores + p);
    for (int h = 0; h < heads; h++)
        soften(t->scores + h * t->scores_stride, t->positions);
    memset(t->mixed, 0, sizeof(float) * heads * t->width);
    int i = 0;
    for (; i + 4 * LANES <= t->width; i += 4 * LANES)
        NAMED(mix_columns)(t, i, 4, heads, half);
    for (; i < t->width; i += LANES)
        NAMED(mix_columns)(t, i, 1, heads, half);
}
