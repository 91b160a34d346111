/* One pass of the lean decoder: tokens of any rows and adapters, from ids to logits.
 *
 * The same mathematics as `core/inference/lean/decoder.py`, which is the readable form of it: norm,
 * queries-keys-values, rotation, attention, output; norm, gate and up, gated unit, down. The
 * structures are mirrored in `core/inference/lean/native.py`.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "pack.h"
#include "pieces.h"
#include "product.h"
#include "threads.h"

typedef struct {
    Matrix qkv, o, gate_up, down;
    const float *q_norm, *k_norm; /* (head_dim,); NULL: none */
} Layer;

typedef struct {
    int32_t layers, width, heads, kv_heads, head_dim, intermediate;
    int32_t half_cache, page; /* positions in a page of the cache */
    float epsilon;
    const float *embedding; /* (vocabulary, width) */
    const Layer *layer;
    Matrix head;
} Model;

typedef struct {
    Model model;
    Team *team;
    const Tiles *tiles;
    const Attend *attends;
    float *space; /* of the largest pass so far */
    size_t size;
} Decoder;

/* A pass as one member of the team sees it. */
typedef struct {
    const Model *model;
    const Pass *pass;
    Team *team;
    const Tiles *tiles;
    const Attend *attends;
    int member, phase, score_width;
    float *hidden, *qkv, *mixed, *gate_up, *low; /* shared, a row for each token */
    float *norms, *scores;                       /* the member's own */
} Work;

enum { MOST_PARTS = 3 };

/* How often `end_of` is called at most: in `compute_layer`, and in all that is around the layers. */
enum { PHASES_OF_LAYER = 11, OTHER_PHASES = 3 };

/* What a product reads and writes: a row for each token. */
typedef struct {
    const float *x;
    int x_stride;
    float *y;
    int y_stride;
} Operands;

static Product product(const Work *w, const Matrix *matrix, Operands of, const float *scale,
                       int add) {
    return (Product){.matrix = matrix, .x = of.x, .y = of.y, .x_stride = of.x_stride,
                     .y_stride = of.y_stride, .add = add, .scale = scale, .tiles = w->tiles};
}

static Product of_group(Product product, const Group *group) {
    product.rows = group->tokens;
    product.count = group->count;
    return product;
}

/* The next task of the present phase; see `next_task`. */
static int next_of(Work *w) { return next_task(w->team, w->phase); }

/* End the present phase; see `end_phase`. */
static void end_of(Work *w, int done, int tasks) {
    end_phase(w->team, w->member, w->phase++, done, tasks);
}

/* Do the tasks of some products, all members together. */
static void do_products(Work *w, const Share *shares, int count) {
    int tasks = 0, before = 0, done = 0;
    for (int i = 0; i < count; i++)
        tasks += shares[i].tasks;
    int task = next_of(w);
    for (int i = 0; task < tasks; i++) {
        const Share own = shares[i];
        for (; task < before + own.tasks; task = next_of(w), done++)
            do_share(&own, task - before);
        before += own.tasks;
    }
    end_of(w, done, tasks);
}

/* y = x W, or y + x W, and for each adapter y + x A B; the parts of B lie side by side in y. */
static void multiply_with_adapters(Work *w, const Matrix *base, Operands of, const float *scale,
                                   int add, int layer, size_t a, size_t b, int parts) {
    const Pass *pass = w->pass;
    const int size = w->team->size;
    Share shares[1 + MOST_GROUPS * MOST_PARTS];
    Operands to_low = {of.x, of.x_stride, w->low, pass->low_width};
    Product whole = product(w, base, of, scale, add);
    whole.count = pass->tokens;
    int count = 0;
    shares[count++] = share(whole, size);
    for (int g = 0; g < pass->groups; g++) {
        const Lora *lora = &pass->group[g].layers[layer];
        const Matrix *down = (const Matrix *)((const char *)lora + a);
        if (down->data)
            shares[count++] =
                share(of_group(product(w, down, to_low, scale, 0), &pass->group[g]), size);
    }
    int touched = count > 1;
    do_products(w, shares, count);
    if (!touched)
        return;
    count = 0;
    for (int g = 0; g < pass->groups; g++) {
        const Lora *lora = &pass->group[g].layers[layer];
        const Matrix *up = (const Matrix *)((const char *)lora + b);
        if (!up->data)
            continue;
        for (int part = 0, column = 0; part < parts; column += up[part++].out) {
            Operands from_low = {w->low + part * up->in, pass->low_width, of.y + column,
                                 of.y_stride};
            shares[count++] =
                share(of_group(product(w, &up[part], from_low, NULL, 1), &pass->group[g]), size);
        }
    }
    do_products(w, shares, count);
}

static void compute_norms(Work *w) {
    if (is_over(w->team, w->phase))
        return; /* This member comes too late for a task, and the numbers are already others. */
    int width = w->model->width;
    for (int t = 0; t < w->pass->tokens; t++)
        w->norms[t] = inverse_norm(w->hidden + (size_t)t * width, width, w->model->epsilon);
}

static void compute_layer(Work *w, int index) {
    const Model *m = w->model;
    const Pass *pass = w->pass;
    const Layer *layer = &m->layer[index];
    const int mixed_width = m->heads * m->head_dim, half = m->head_dim / 2;
    const int qkv_width = mixed_width + 2 * m->kv_heads * m->head_dim;
    const Attention attention = {m->heads, m->kv_heads, m->head_dim, m->half_cache,
                                 m->page,  index,       m->epsilon,  w->attends};

    compute_norms(w);
    multiply_with_adapters(w, &layer->qkv, (Operands){w->hidden, m->width, w->qkv, qkv_width},
                           w->norms, 0, index, offsetof(Lora, a_qkv), offsetof(Lora, b_q), 3);
    int done = 0;
    for (int t; (t = next_of(w)) < pass->tokens; done++)
        remember(&attention, w->qkv + (size_t)t * qkv_width, pass->pages[t], pass->positions[t],
                 pass->given->cosines + pass->positions[t] * half,
                 pass->given->sines + pass->positions[t] * half, layer->q_norm, layer->k_norm);
    end_of(w, done, pass->tokens);
    const int heads = pass->tokens * m->kv_heads;
    done = 0;
    for (int i; (i = next_of(w)) < heads; done++) {
        int t = i / m->kv_heads;
        see(&attention, w->qkv + (size_t)t * qkv_width, (const void *const *)pass->pages[t],
            i % m->kv_heads, (int)pass->positions[t] + 1, w->scores, w->score_width,
            w->mixed + (size_t)t * mixed_width);
    }
    end_of(w, done, heads);
    multiply_with_adapters(w, &layer->o, (Operands){w->mixed, mixed_width, w->hidden, m->width},
                           NULL, 1, index, offsetof(Lora, a_o), offsetof(Lora, b_o), 1);

    compute_norms(w);
    multiply_with_adapters(
        w, &layer->gate_up, (Operands){w->hidden, m->width, w->gate_up, 2 * m->intermediate},
        w->norms, 0, index, offsetof(Lora, a_gate_up), offsetof(Lora, b_gate), 2);
    done = 0;
    for (int t; (t = next_of(w)) < pass->tokens; done++)
        gate(w->gate_up + (size_t)t * 2 * m->intermediate, m->intermediate);
    end_of(w, done, pass->tokens);
    multiply_with_adapters(
        w, &layer->down, (Operands){w->gate_up, 2 * m->intermediate, w->hidden, m->width}, NULL, 1,
        index, offsetof(Lora, a_down), offsetof(Lora, b_down), 1);
}

static void compute_logits(Work *w) {
    const Model *m = w->model;
    const Pass *pass = w->pass;
    /* The kept tokens side by side, where the attention has left room. */
    float *last = w->gate_up;
    int done = 0;
    for (int i; (i = next_of(w)) < pass->kept; done++) {
        const float *hidden = w->hidden + (size_t)pass->keep[i] * m->width;
        float norm = inverse_norm(hidden, m->width, m->epsilon);
        for (int c = 0; c < m->width; c++)
            last[(size_t)i * m->width + c] = hidden[c] * norm;
    }
    end_of(w, done, pass->kept);
    Operands of = {last, m->width, pass->given->logits, m->head.out};
    Product head = product(w, &m->head, of, NULL, 0);
    head.count = pass->kept;
    Share shares = share(head, w->team->size);
    do_products(w, &shares, 1);
}

typedef struct {
    Decoder *decoder;
    const Pass *pass;
    int score_width;
} Task;

static size_t member_floats(const Pass *pass, int score_width) {
    return (size_t)pass->tokens + (size_t)TOGETHER * score_width;
}

static void compute(Team *team, int member, void *given) {
    const Task *task = given;
    const Model *m = &task->decoder->model;
    const Pass *pass = task->pass;
    size_t tokens = (size_t)pass->tokens;
    int mixed_width = m->heads * m->head_dim;
    Work w = {.model = m, .pass = pass, .team = team, .tiles = task->decoder->tiles,
              .attends = task->decoder->attends, .member = member, .score_width = task->score_width};
    float *next = task->decoder->space;
    w.hidden = next, next += tokens * m->width;
    w.qkv = next, next += tokens * (mixed_width + 2 * m->kv_heads * m->head_dim);
    w.mixed = next, next += tokens * mixed_width;
    w.gate_up = next, next += tokens * (2 * m->intermediate + m->width);
    w.low = next, next += tokens * pass->low_width;
    w.norms = next + member * member_floats(pass, task->score_width);
    w.scores = w.norms + tokens;

    int done = 0;
    for (int t; (t = next_of(&w)) < pass->tokens; done++)
        memcpy(w.hidden + (size_t)t * m->width, m->embedding + (size_t)pass->given->ids[t] * m->width,
               sizeof(float) * m->width);
    end_of(&w, done, pass->tokens);
    for (int layer = 0; layer < m->layers; layer++)
        compute_layer(&w, layer);
    compute_logits(&w);
}

/* Changes with every structure above. */
int tunesmith_version(void) { return 6; }

/* Whether this processor has what the code was compiled for. */
int tunesmith_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

void tunesmith_close(Decoder *decoder) {
    if (!decoder)
        return;
    if (decoder->team)
        end_team(decoder->team);
    free(decoder->space);
    free(decoder);
}

/* The width of the vectors that this processor computes with. */
int tunesmith_vector_bits(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") ? 512 : 256;
}

/* Return a decoder over matrices that the caller keeps in memory; NULL without memory.
 *
 * It computes the same with vectors of either width, to the last bit.
 */
Decoder *tunesmith_open(const Model *model, int threads, int vector_bits) {
    Decoder *decoder = calloc(1, sizeof *decoder);
    if (!decoder)
        return NULL;
    decoder->model = *model;
    decoder->tiles = vector_bits == 512 ? &tiles_512 : &tiles_256;
    decoder->attends = attends_for(model->half_cache, model->head_dim, vector_bits);
    decoder->team = make_team(threads > 1 ? threads : 1,
                              OTHER_PHASES + PHASES_OF_LAYER * model->layers);
    if (!decoder->team) {
        tunesmith_close(decoder);
        return NULL;
    }
    watch_over(decoder->team);
    return decoder;
}

/* Have room for what a pass computes; return whether there is memory for it. */
static int make_room(Decoder *decoder, const Pass *pass, int score_width) {
    const Model *m = &decoder->model;
    size_t widths = (size_t)m->width * 2 + (size_t)m->heads * m->head_dim * 2 +
                    (size_t)m->kv_heads * m->head_dim * 2 + (size_t)m->intermediate * 2 +
                    (size_t)pass->low_width;
    size_t size = (size_t)pass->tokens * widths +
                  (size_t)decoder->team->size * member_floats(pass, score_width);
    if (size <= decoder->size)
        return 1;
    free(decoder->space);
    decoder->space = malloc(size * sizeof(float));
    decoder->size = decoder->space ? size : 0;
    return decoder->space != NULL;
}

/* Compute a pass; return 0, or what is wrong when nothing has changed. */
int tunesmith_step(Decoder *decoder, const Pieces *given) {
    Pass pass;
    int wrong = begin_pass(&pass, given, decoder->model.head.out);
    Task task = {decoder, &pass, (int)((pass.longest + 7) / 8 * 8)};
    if (!wrong && !make_room(decoder, &pass, task.score_width))
        wrong = NO_MEMORY;
    if (!wrong)
        run_together(decoder->team, compute, &task);
    end_pass(&pass);
    return wrong;
}
