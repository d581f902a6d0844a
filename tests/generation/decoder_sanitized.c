/* Runs decoder.c on random shapes, every buffer as long as the decoder may touch and no longer.

   test_native.py builds it with the compiler's sanitizers, which end it at the first number read
   or written out of place, at undefined behaviour, at a leak and at a race of two threads. */

#include DECODER

#include <stdio.h>

static unsigned state = 1;

static int between(int least, int most) {
    state = state * 1664525u + 1013904223u;
    return least + (int)((state >> 8) % (unsigned)(most - least + 1));
}

static Numbers filled(int kind, size_t count) {
    size_t size = kind == FLOAT32 ? 4 : 2;
    char *at = malloc(count * size);
    for (size_t i = 0; i < count; i++) {
        float number = between(-100, 100) / 400.0f;
        uint16_t rounded = as_bfloat16(number);
        memcpy(at + i * size, kind == FLOAT32 ? (void *)&number : (void *)&rounded, size);
    }
    return (Numbers){at, kind};
}

/* Blocks of any bits, with scales of about 1 / 100. */
static Numbers blocks(int kind, size_t count) {
    size_t size = block_bytes(kind), bytes = count / BLOCK * size;
    uint8_t *at = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) at[i] = (uint8_t)between(0, 255);
    for (size_t i = 0; i < bytes; i += size) {
        at[i + 1] = 0x20 + between(0, 1) * 0x80;
        if (kind == Q4_1) at[i + 3] = 0x20;
    }
    return (Numbers){at, kind};
}

static Numbers any(size_t count) { return filled(between(0, 1), count); }

static Numbers table(size_t rows, size_t columns) {
    int kind = columns % BLOCK ? between(0, 1) : between(0, 4);
    return kind < Q8_0 ? filled(kind, rows * columns) : blocks(kind, rows * columns);
}

static Matrix matrix(int rows, int columns, int max_rank) {
    Matrix m = {rows, columns, between(0, 2), table(rows, columns), {0}, NULL};
    if (between(0, 1)) m.bias = any(rows);
    Update *updates = malloc(m.n_updates * sizeof *updates);
    for (int i = 0; i < m.n_updates; i++) {
        int rank = between(1, max_rank);
        updates[i] = (Update){rank, between(ALL, 2), 0.5f, any((size_t)rank * columns), any((size_t)rows * rank)};
    }
    m.updates = updates;
    return m;
}

static Norm norm(int width, int there) {
    return there ? (Norm){any(width), between(0, 1) ? any(width) : (Numbers){0}} : (Norm){0};
}

static void free_matrix(Matrix m) {
    for (int i = 0; i < m.n_updates; i++)
        free((void *)m.updates[i].a.at), free((void *)m.updates[i].b.at);
    free((void *)m.weight.at), free((void *)m.bias.at), free((void *)m.updates);
}

static void free_norm(Norm n) { free((void *)n.weight.at), free((void *)n.bias.at); }

static Layer layer(const Model *m, int qk_norm) {
    int rank = m->max_rank, q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim;
    return (Layer){
        norm(m->width, 1), norm(m->width, 1), norm(m->head_dim, qk_norm),
        norm(m->head_dim, qk_norm), matrix(q, m->width, rank), matrix(kv, m->width, rank),
        matrix(kv, m->width, rank), matrix(m->width, q, rank),
        m->mlp == SWIGLU ? matrix(m->inner, m->width, rank) : (Matrix){0},
        matrix(m->inner, m->width, rank), matrix(m->width, m->inner, rank),
    };
}

static void free_layer(Layer l) {
    free_norm(l.input_norm), free_norm(l.mlp_norm), free_norm(l.q_norm), free_norm(l.k_norm);
    free_matrix(l.q), free_matrix(l.k), free_matrix(l.v), free_matrix(l.o);
    free_matrix(l.gate), free_matrix(l.up), free_matrix(l.down);
}

/* A cache of any length, for one text. */
static Cache cache(const Model *m) {
    int length = between(1, m->max_length);
    char **layers = malloc(2 * m->n_layer * sizeof *layers);
    for (int i = 0; i < 2 * m->n_layer; i++)
        layers[i] = (char *)filled(m->cache_kind, (size_t)m->kv_heads * length * m->head_dim).at;
    return (Cache){layers, length};
}

static void free_cache(const Model *m, Cache cache) {
    for (int i = 0; i < 2 * m->n_layer; i++) free(cache.layers[i]);
    free((void *)cache.layers);
}

/* Fills the caches of some texts, each at its own pace: a step has up to three new tokens of a text,
   or none. Returns whether every logit is a finite number. */
static int steps(const Model *m, int rows, int threads) {
    int finite = 1, most = 3 * rows, left = 0, *lengths = calloc(rows, sizeof *lengths);
    Pool *pool = pool_make(m, most, threads);
    Cache *caches = malloc(rows * sizeof *caches);
    for (int row = 0; row < rows; row++) caches[row] = cache(m), left += caches[row].length;
    while (left && pool) {
        int count = 0, numbers = 1 + m->n_prev;
        Token *all = malloc(most * sizeof *all);
        for (int row = 0; row < rows; row++)
            for (int i = between(0, 3); i && lengths[row] < caches[row].length; i--)
                all[count++] = (Token){row, lengths[row]++, between(0, 2)};
        int wanted = count ? between(0, count) : 0;
        Token *tokens = malloc(count * sizeof *tokens);
        if (count) memcpy(tokens, all, count * sizeof *tokens);
        int64_t *ids = malloc(count * numbers * sizeof *ids);
        float *logits = malloc((size_t)wanted * m->vocab * sizeof *logits);
        for (int i = 0; i < count * numbers; i++) ids[i] = between(0, m->vocab - 1);
        pool_step(pool, caches, tokens, ids, count, wanted, logits);
        for (int i = 0; i < wanted * m->vocab; i++) finite = finite && isfinite(logits[i]);
        free(all), free(tokens), free(ids), free(logits);
        left -= count;
    }
    for (int row = 0; row < rows; row++) free_cache(m, caches[row]);
    free(caches), free(lengths);
    if (pool) pool_free(pool);
    return pool && finite;
}

static int any_width(void) { return between(0, 1) ? between(1, 60) : BLOCK * between(1, 3); }

static int any_shape(void) {
    int rows = between(1, 4), groups = between(1, 3), rank = between(1, 7);
    Model m = {
        .n_layer = between(1, 3), .width = any_width(), .inner = any_width(),
        .heads = groups * between(1, 3), .kv_heads = groups, .vocab = between(1, 50),
        .positions = between(LEARNED, ROTARY), .norm = between(LAYERNORM, RMSNORM),
        .mlp = between(GELU, SWIGLU), .n_prev = between(0, 3),
        .cache_kind = between(FLOAT32, BFLOAT16), .max_length = between(1, 20), .max_rank = rank,
        .eps = 1e-5f,
    };
    m.head_dim = m.positions == ROTARY ? 2 * between(1, 9) : between(1, 19);
    m.final_norm = norm(m.width, 1), m.head = matrix(m.vocab, m.width, rank);
    m.embedding = (Matrix){m.vocab, m.width, 0, table(m.vocab, m.width), {0}, NULL};
    Matrix previous[3] = {0}, learned = {.weight = any((size_t)m.max_length * m.width)};
    for (int d = 0; d < m.n_prev; d++) previous[d].weight = table(m.vocab, m.width);
    Numbers frequencies = filled(FLOAT32, m.head_dim / 2);
    m.prev_embeddings = previous, m.learned = &learned, m.frequencies = frequencies.at;
    m.layers = malloc(m.n_layer * sizeof *m.layers);
    int qk_norm = between(0, 1);
    for (int i = 0; i < m.n_layer; i++) m.layers[i] = layer(&m, qk_norm);
    int finite = steps(&m, rows, between(1, 5));
    for (int i = 0; i < m.n_layer; i++) free_layer(m.layers[i]);
    for (int d = 0; d < m.n_prev; d++) free_matrix(previous[d]);
    free_matrix(m.embedding), free_matrix(m.head), free_norm(m.final_norm), free_matrix(learned);
    free((void *)frequencies.at), free(m.layers);
    return finite;
}

int main(void) {
    for (int i = 0; i < 60; i++)
        if (!any_shape()) return fprintf(stderr, "shape %d\n", i), 1;
    return 0;
}
