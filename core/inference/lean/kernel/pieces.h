/* What a pass is given, pieces of rows, and the same by tokens and adapters.
 *
 * `Piece` and `Pieces` are mirrored in `core/inference/lean/native.py`.
 */
#ifndef TUNESMITH_PIECES_H
#define TUNESMITH_PIECES_H

#include <stdint.h>
#include <stdlib.h>

#include "product.h"

/* An adapter's matrices for one layer. A is (in, parts x rank); each part has a B of (rank, out)
 * with the adapter's scale in it. */
typedef struct {
    Matrix a_qkv, b_q, b_k, b_v, a_o, b_o, a_gate_up, b_gate, b_up, a_down, b_down;
} Lora;

/* Tokens of one row that follow each other. */
typedef struct {
    int64_t start;       /* position of the first one */
    void *const *pages;  /* of the row */
    const Lora *adapter; /* for each layer; NULL: none */
    int32_t tokens;
    int32_t low_width; /* of the adapter's widest A */
} Piece;

typedef struct {
    const Piece *piece;
    const int32_t *ids;           /* of all tokens, one piece behind the other */
    const float *cosines, *sines; /* of the angles at each position, (positions, head_dim / 2) */
    float *logits;                /* (pieces, vocabulary), or (tokens, vocabulary) */
    int32_t pieces;
    int32_t every_token; /* whether the logits of all tokens are wanted, not those of the last ones */
} Pieces;

/* Tokens that use one adapter. */
typedef struct {
    const Lora *layers;
    const int32_t *tokens;
    int32_t count;
} Group;

typedef struct {
    const Pieces *given;
    int32_t tokens, kept, low_width, groups;
    int64_t longest; /* text */
    void *const **pages; /* of each token's row */
    int64_t *positions;
    int32_t *keep; /* tokens whose logits are wanted */
    Group *group;  /* in the same memory as all of the above */
} Pass;

/* What may be wrong with the pieces of a pass. */
enum { NO_MEMORY = 1, NO_SUCH_TOKEN, TOO_MANY_ADAPTERS };

enum { MOST_GROUPS = 64 };

static int has_group(const Pass *pass, const Lora *adapter) {
    for (int g = 0; g < pass->groups; g++)
        if (pass->group[g].layers == adapter)
            return 1;
    return 0;
}

/* Find which tokens use which adapter; return whether there are few enough adapters.
 *
 * `members` takes the tokens of all groups.
 */
static int sort_by_adapter(Pass *pass, int32_t *members) {
    const Pieces *given = pass->given;
    for (int i = 0; i < given->pieces; i++) {
        const Lora *adapter = given->piece[i].adapter;
        if (!adapter || has_group(pass, adapter))
            continue;
        if (pass->groups == MOST_GROUPS)
            return 0;
        Group *group = &pass->group[pass->groups++];
        *group = (Group){.layers = adapter, .tokens = members};
        for (int other = 0, t = 0; other < given->pieces; t += given->piece[other++].tokens)
            if (given->piece[other].adapter == adapter)
                for (int own = 0; own < given->piece[other].tokens; own++)
                    *members++ = t + own;
        group->count = (int32_t)(members - group->tokens);
    }
    return 1;
}

/* Note for each token where it belongs. */
static void sort_by_token(Pass *pass) {
    const Pieces *given = pass->given;
    for (int i = 0, t = 0; i < given->pieces; i++) {
        const Piece *piece = &given->piece[i];
        for (int own = 0; own < piece->tokens; own++, t++) {
            pass->pages[t] = piece->pages;
            pass->positions[t] = piece->start + own;
            if (given->every_token || own == piece->tokens - 1)
                pass->keep[pass->kept++] = t;
        }
        if (piece->start + piece->tokens > pass->longest)
            pass->longest = piece->start + piece->tokens;
        if (piece->adapter && piece->low_width > pass->low_width)
            pass->low_width = piece->low_width;
    }
}

/* Make a pass of pieces; return 0, or what is wrong. Ended by `end_pass` in any case. */
static int begin_pass(Pass *pass, const Pieces *given, int vocabulary) {
    *pass = (Pass){.given = given};
    for (int i = 0; i < given->pieces; i++)
        pass->tokens += given->piece[i].tokens;
    for (int t = 0; t < pass->tokens; t++)
        if (given->ids[t] < 0 || given->ids[t] >= vocabulary)
            return NO_SUCH_TOKEN;
    size_t tokens = (size_t)pass->tokens;
    pass->group = malloc(MOST_GROUPS * sizeof *pass->group +
                         tokens * (sizeof *pass->pages + sizeof *pass->positions +
                                   2 * sizeof *pass->keep));
    if (!pass->group)
        return NO_MEMORY;
    pass->pages = (void *const **)(pass->group + MOST_GROUPS);
    pass->positions = (int64_t *)(pass->pages + tokens);
    pass->keep = (int32_t *)(pass->positions + tokens);
    sort_by_token(pass);
    return sort_by_adapter(pass, pass->keep + tokens) ? 0 : TOO_MANY_ADAPTERS;
}

static void end_pass(Pass *pass) { free(pass->group); }

#endif
