/* Products of activations with stored matrices.
 *
 * A matrix of shape (in, out) lies in panels of 16 outputs: (out / 16, in, 16), the last one filled
 * up with zeros, as float16 or float32. Activations and sums are float32. Each result is one sum
 * over the inputs in their order, by the same operations however many rows there are, so that a
 * row's results do not depend on its neighbours, not even in the last bit.
 */
#ifndef TUNESMITH_PRODUCT_H
#define TUNESMITH_PRODUCT_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

enum { PANEL = 16, WIDEST = 3, TILE_ROWS = 8, FEW_ROWS = 24, NEAREST = 3072 };

typedef struct Tiles Tiles;

typedef struct {
    const void *data; /* NULL: not there */
    const float *bias; /* NULL: none */
    int32_t in, out, half;
    float factor; /* of all numbers in `data` */
} Matrix;

/* Rows of x times a matrix. */
typedef struct {
    const Matrix *matrix;
    const float *x;
    float *y;
    const int32_t *rows; /* which ones; NULL: the first `count` */
    int32_t count, x_stride, y_stride;
    int32_t add; /* to what y holds */
    const float *scale; /* of each row of x; NULL: 1 */
    const Tiles *tiles; /* what computes it */
} Product;

/* What a tile computes, and which weights it has fetched from memory in the meantime. */
typedef struct {
    const void *data;
    size_t panel_size; /* numbers */
    int inputs;
    const float *const *x;
    float (*sums)[WIDEST * PANEL];
    const char *ahead;
    size_t ahead_stride; /* bytes from panel to panel */
    int ahead_each;      /* bytes for each input */
} TileWork;

typedef void (*Tile)(const TileWork *);

/* `add_up`, in registers of eight numbers, */
#define LANES 8
#include "vectors.h"
#include "tile.h"
#undef LANES

/* and `add_up_512`, in registers of twice the width, of which there are twice as many. */
#define LANES 16
#include "vectors.h"
#include "tile.h"
#undef LANES

INLINE int row_of(const Product *p, int index) { return p->rows ? p->rows[index] : index; }

INLINE int panels_of(const Matrix *m) { return (m->out + PANEL - 1) / PANEL; }

/* One function for each shape that fits into the registers. */
#define TILE(rows, panels, half)                                                                  \
    static __attribute__((noinline)) void tile_##rows##_##panels##_##half(const TileWork *t) {    \
        add_up(rows, panels, half, t);                                                            \
    }
#define TILES(half)                                                                               \
    TILE(1, 1, half) TILE(2, 1, half) TILE(3, 1, half) TILE(4, 1, half) TILE(5, 1, half)          \
    TILE(6, 1, half) TILE(1, 3, half) TILE(2, 2, half)
TILES(0)
TILES(1)
#define TILE_512(rows, panels, half)                                                              \
    static AVX512 __attribute__((noinline)) void tile_512_##rows##_##panels##_##half(             \
        const TileWork *t) {                                                                      \
        add_up_512(rows, panels, half, t);                                                        \
    }
#define TILES_512(panels, half)                                                                   \
    TILE_512(1, panels, half) TILE_512(2, panels, half) TILE_512(3, panels, half)                 \
    TILE_512(4, panels, half) TILE_512(5, panels, half) TILE_512(6, panels, half)                 \
    TILE_512(7, panels, half) TILE_512(8, panels, half)
TILES_512(1, 0)
TILES_512(1, 1)
TILES_512(3, 0)
TILES_512(3, 1)

/* The tiles of a kind of processor. */
struct Tiles {
    int rows;                      /* the most that one takes */
    int many_panels;               /* that a block of rows takes where there are many rows */
    int panels[TILE_ROWS + 1];     /* that the wide ones take at a time, by rows */
    Tile narrow[2][TILE_ROWS + 1]; /* of one panel, by half and rows */
    Tile wide[2][TILE_ROWS + 1];
};

#define NARROW(half)                                                                              \
    { NULL, tile_1_1_##half, tile_2_1_##half, tile_3_1_##half, tile_4_1_##half, tile_5_1_##half,  \
      tile_6_1_##half }
static const Tiles tiles_256 = {
    .rows = 6,
    .many_panels = 4,
    .panels = {0, 3, 2, 1, 1, 1, 1},
    .narrow = {NARROW(0), NARROW(1)},
    .wide = {{NULL, tile_1_3_0, tile_2_2_0}, {NULL, tile_1_3_1, tile_2_2_1}},
};
#define ALL_512(panels, half)                                                                     \
    { NULL, tile_512_1_##panels##_##half, tile_512_2_##panels##_##half,                           \
      tile_512_3_##panels##_##half, tile_512_4_##panels##_##half, tile_512_5_##panels##_##half,   \
      tile_512_6_##panels##_##half, tile_512_7_##panels##_##half, tile_512_8_##panels##_##half }
static const Tiles tiles_512 = {
    .rows = 8,
    .many_panels = 6,
    .panels = {0, 3, 3, 3, 3, 3, 3, 3, 3},
    .narrow = {ALL_512(1, 0), ALL_512(1, 1)},
    .wide = {ALL_512(3, 0), ALL_512(3, 1)},
};

/* Hand out a row's sums: scaled, with the bias, and added to what is there if that is wanted. */
INLINE void store(const Product *p, int index, int column, const float *sums, int width) {
    int row = row_of(p, index);
    float *y = p->y + (size_t)row * p->y_stride + column;
    const float *bias = p->matrix->bias ? p->matrix->bias + column : NULL;
    float scale = p->matrix->factor * (p->scale ? p->scale[row] : 1.0f);
    int c = 0;
    if (width > p->matrix->out - column)
        width = p->matrix->out - column;
    for (; c + 8 <= width; c += 8) {
        __m256 value = _mm256_mul_ps(_mm256_load_ps(sums + c), _mm256_set1_ps(scale));
        if (bias)
            value = _mm256_add_ps(value, _mm256_loadu_ps(bias + c));
        if (p->add)
            value = _mm256_add_ps(value, _mm256_loadu_ps(y + c));
        _mm256_storeu_ps(y + c, value);
    }
    for (; c < width; c++) {
        float value = sums[c] * scale + (bias ? bias[c] : 0.0f);
        y[c] = p->add ? y[c] + value : value;
    }
}

INLINE int block_count(int rows, int most) { return (rows + most - 1) / most; }

/* Rows in blocks of about the same size, as a block of few rows leaves registers unused. */
INLINE int block_rows(int rows, int most) {
    int blocks = block_count(rows, most);
    return (rows + blocks - 1) / blocks;
}

/* Panels `first` to `last` of a product.
 *
 * Few rows wait for the weights, which are fetched while others are computed: a little ahead where
 * they are needed once, else the next panel, evenly over the passes of this one. They are marked as
 * needed no more afterwards, so that they leave in the caches what is. Many rows wait for
 * activations, so a block of rows takes several panels.
 */
static void multiply(const Product *p, int first, int last) {
    const Matrix *m = p->matrix;
    const Tiles *tiles = p->tiles;
    const size_t panel_size = (size_t)m->in * PANEL, panel_bytes = panel_size * (m->half ? 2 : 4);
    const int rows_each = block_rows(p->count, tiles->rows);
    const int passes = (p->count + rows_each - 1) / rows_each;
    const int together = p->count > FEW_ROWS ? tiles->many_panels : tiles->panels[rows_each];
    float sums[TILE_ROWS][WIDEST * PANEL] __attribute__((aligned(64)));
    const float *x[TILE_ROWS];
    for (int group = first; group < last; group += together) {
        int end = group + together < last ? group + together : last;
        for (int begin = 0; begin < p->count; begin += rows_each) {
            int rows = p->count - begin < rows_each ? p->count - begin : rows_each;
            for (int i = 0; i < rows; i++)
                x[i] = p->x + (size_t)row_of(p, begin + i) * p->x_stride;
            for (int panel = group, step; panel < end; panel += step) {
                step = end - panel < tiles->panels[rows] ? 1 : tiles->panels[rows];
                const char *data = (const char *)m->data + panel_bytes * panel;
                int ahead_each = (int)(panel_bytes / m->in) / passes;
                TileWork work = {.data = data, .panel_size = panel_size, .inputs = m->in, .x = x,
                                 .sums = sums, .ahead_stride = panel_bytes,
                                 .ahead_each = ahead_each};
                size_t distance = passes > 1 && step * panel_bytes > NEAREST
                                      ? step * panel_bytes : NEAREST;
                work.ahead = data + distance + (size_t)(begin / rows_each) * ahead_each * m->in;
                (step > 1 ? tiles->wide : tiles->narrow)[m->half][rows](&work);
                for (int i = 0; i < rows; i++)
                    store(p, begin + i, panel * PANEL, sums[i], step * PANEL);
            }
        }
    }
}

/* Products of one phase, in tasks of some panels each.
 *
 * Taking a task costs a line that goes from processor to processor, so one has some numbers to
 * compute with at least: short matrices, such as those of adapters, are hardly divided.
 */
enum { MOST_PANELS = 48, LEAST_NUMBERS = 24576 };

typedef struct {
    Product product;
    int panels_each, tasks;
} Share;

/* Panels of a task that is worth taking, so that tasks are of about the same size. */
INLINE int least_panels(const Product *p) {
    int panels = panels_of(p->matrix);
    int64_t numbers = (int64_t)panels * PANEL * p->matrix->in;
    int64_t tasks = numbers * block_count(p->count, p->tiles->rows) / LEAST_NUMBERS;
    return tasks > 1 ? (int)((panels + tasks - 1) / tasks) : panels;
}

INLINE Share share(Product product, int members) {
    int panels = panels_of(product.matrix), least = least_panels(&product);
    int each = panels / (members * 6);
    each = each < 3 ? 3 : each > MOST_PANELS ? MOST_PANELS : each / 6 * 6 > 0 ? each / 6 * 6 : 3;
    if (each < least)
        each = least;
    return (Share){product, each, (panels + each - 1) / each};
}

INLINE void do_share(const Share *s, int task) {
    int panels = panels_of(s->product.matrix);
    int first = task * s->panels_each;
    int last = first + s->panels_each < panels ? first + s->panels_each : panels;
    multiply(&s->product, first, last);
}

#endif
