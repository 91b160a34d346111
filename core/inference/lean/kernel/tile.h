/* The sums of some rows and neighbouring panels, which stay in registers throughout.
 *
 * `product.h` includes this once for each width of vectors (`vectors.h`): the algorithm is one, so
 * that the order of the sums is, too.
 */
TARGET INLINE void NAMED(add_up)(const int rows, const int panels, const int half,
                                 const TileWork *t) {
    enum { EACH = PANEL / LANES }; /* vectors of a panel */
    VECTOR sum[TILE_ROWS][EACH * WIDEST];
    const void *data = t->data;
    const size_t panel_size = t->panel_size;
    const char *ahead = t->ahead;
    const float *x[TILE_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        x[r] = t->x[r];
#pragma GCC unroll 6
        for (int j = 0; j < EACH * panels; j++)
            sum[r][j] = ZERO();
    }
    for (int k = 0, inputs = t->inputs; k < inputs; k++, ahead += t->ahead_each) {
        VECTOR w[EACH * WIDEST];
#pragma GCC unroll 3
        for (int j = 0; j < panels; j++)
            _mm_prefetch(ahead + j * t->ahead_stride, _MM_HINT_NTA);
#pragma GCC unroll 6
        for (int j = 0; j < EACH * panels; j++)
            w[j] = LOAD(data, j / EACH * panel_size + (size_t)k * PANEL + LANES * (j % EACH), half);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            VECTOR value = BROADCAST(x[r] + k);
#pragma GCC unroll 6
            for (int j = 0; j < EACH * panels; j++)
                sum[r][j] = FMADD(value, w[j], sum[r][j]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 6
        for (int j = 0; j < EACH * panels; j++)
            STORE(t->sums[r] + LANES * j, sum[r][j]);
}
