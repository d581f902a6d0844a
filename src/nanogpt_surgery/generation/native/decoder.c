/* One decode step of a GPT: the logits after each of N new tokens, from the caches of their texts.

   It computes what `SimpleGPT.forward` computes, in one call: nothing is allocated, and threads
   that wait for each other spin. The new tokens may belong to one text or to several, of any
   lengths and each with its own adapter; every weight is read once for all of them, and the sums
   of one do not depend on which others there are. Called through ctypes; decoder.py fills in the
   structures and has checked every size: nothing is checked here but the ids.

   Legend: N new tokens, C width, I width inside the feed-forward, H heads,
   G key-value heads, D head width, V vocabulary, S tokens so far. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels.h"

enum { LAYERNORM, RMSNORM };
enum { GELU, GELU_TANH, RELU2, SWIGLU };
enum { LEARNED, ROTARY };

/* s · B A x beside a product: A (rank, columns), B (rows, rank); for the tokens of one adapter, or
   for all where `adapter` is ALL. */
enum { ALL = -1 };
typedef struct {
    int32_t rank, adapter;
    float scale;
    Numbers a, b;
} Update;

/* y = W x + b, W (rows, columns). */
typedef struct {
    int32_t rows, columns, n_updates;
    Numbers weight, bias;
    const Update *updates;
} Matrix;

typedef struct {
    Numbers weight, bias;
} Norm;

typedef struct {
    Norm input_norm, mlp_norm, q_norm, k_norm;  /* of q and k: none without QK norm */
    Matrix q, k, v, o, gate, up, down;          /* gate: rows 0 where there is none */
} Layer;

typedef struct {
    int32_t n_layer, width, inner, heads, kv_heads, head_dim, vocab;
    int32_t positions, norm, mlp, n_prev, cache_kind, max_length, max_rank;
    float eps;
    Norm final_norm;
    Matrix embedding, head;
    const Matrix *prev_embeddings;      /* n_prev tables */
    const Matrix *learned;              /* one table of positions, or NULL */
    const float *frequencies;           /* radians a token for each pair, (D / 2) */
    Layer *layers;
} Model;

/* The cache of a text: of each layer the keys, then the values, each (G, length, D). */
typedef struct {
    char *const *layers;
    int32_t length;
} Cache;

/* A new token: the number of its text's cache, its position there, the adapter of its text. */
typedef struct {
    int32_t cache, position, adapter;
} Token;

/* ---- threads: awake within a step, asleep between steps ---- */

typedef struct Pool Pool;

typedef struct {
    Pool *pool;
    int number;
    float *h, *scores, *low;            /* its own: (N, C), (H / G, max_length), (largest rank) */
    char *input;                        /* N vectors as a matrix takes them */
    int of_h;                           /* the kind of matrix for which `input` holds h, or -1 */
} Worker;

struct Pool {
    int threads, stopping, most;        /* tokens of a step */
    pid_t process;                      /* that the threads belong to */
    unsigned round;                     /* of steps: a new number wakes the workers */
    pthread_mutex_t lock;
    pthread_cond_t wake;                /* at a new round, at the end, and past a barrier */
    pthread_t *handles;
    Worker *workers;
    atomic_uint arrived, phase, asleep; /* of the barrier */
    /* The step at hand. */
    const Model *model;
    int count;                          /* N */
    const Cache *caches;
    const Token *tokens;
    const int64_t *ids;                 /* (N, 1 + n_prev): the new id, the one before it, … */
    float *x, *q, *k, *v, *y, *inner;   /* (N, …) */
    float *turns;                       /* (N, D): the cosines of a token's angles, the sines */
    float *logits;                      /* (wanted, V): after the last tokens */
    int wanted;
};

enum { LINE = 64 };                     /* bytes of the processor's cache */
enum { SPINS = 30000 };                 /* some tens of microseconds */

/* All wait here for the last. They spin at first: a step has some hundred barriers, each a few
   microseconds apart, and to sleep and wake takes longer. Whoever waits longer waits for a thread
   that has lost its processor to another program, and sleeps, so as not to take it one more. */
static void barrier(Pool *p) {
    unsigned phase = atomic_load(&p->phase);
    if (atomic_fetch_add(&p->arrived, 1) + 1 == (unsigned)p->threads) {
        atomic_store(&p->arrived, 0);
        atomic_fetch_add(&p->phase, 1);
        if (!atomic_load(&p->asleep)) return;
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
        return;
    }
    for (int i = 0; i < SPINS; i++)
        if (atomic_load_explicit(&p->phase, memory_order_acquire) != phase) return;
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->asleep, 1);    /* before it looks again: the last looks after it counts */
    while (atomic_load(&p->phase) == phase) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->asleep, 1);
    pthread_mutex_unlock(&p->lock);
}

/* A worker's share of `count` things, in dozens: whole tiles. */
static void share(const Worker *w, int count, int *first, int *last) {
    int dozens = (count + 11) / 12, threads = w->pool->threads;
    *first = (int)((int64_t)dozens * w->number / threads) * 12;
    *last = (int)((int64_t)dozens * (w->number + 1) / threads) * 12;
    if (*last > count) *last = count;
}

/* ---- the parts of a step ---- */

/* Adds s · B A x to rows first … last of y, for the tokens that have this adapter. */
static void add_update(
    const Worker *w, const Update *update, size_t n, int first, int last, int begin,
    const float *x, size_t x_stride, float *y, size_t y_stride) {
    const Pool *p = w->pool;
    for (int b = begin; b < p->count; b++) {
        if (update->adapter != ALL && update->adapter != p->tokens[b].adapter) continue;
        for (int i = 0; i < update->rank; i++)
            w->low[i] = dot(update->a, i, n, x + b * x_stride);
        for (int r = first; r < last; r++)
            y[b * y_stride + r] += update->scale * dot(update->b, r, update->rank, w->low);
    }
}

/* Writes a tile, `rows` from r on and `inputs` from b on, to y, or adds it. */
static void put(
    const Matrix *m, int r, int rows, int inputs, Tile tile, float *y, size_t stride, int add) {
    for (int j = 0; j < rows; j++) {
        float bias = m->bias.at ? number_at(m->bias, r + j) : 0;
        for (int i = 0; i < inputs; i++) {
            float *to = y + i * stride + r + j, value = tile[j][i];
            if (m->bias.at) value += bias;
            *to = add ? *to + value : value;
        }
    }
}

/* Rows first … last of y = W x + b + Σ s · B A x, for each input from `begin` on; `add` adds to y. */
static void product(
    Worker *w, const Matrix *m, int begin, const float *x, size_t x_stride, float *y,
    size_t y_stride, int add) {
    int first, last, count = w->pool->count, kind = m->weight.kind;
    size_t n = m->columns, room = room_for(kind, n), row = row_bytes(kind, n);
    const char *in = room ? w->input : (const char *)x;
    size_t stride = room ? room : x_stride * sizeof *x;
    Tile out;
    share(w, m->rows, &first, &last);
    if (room && !(x == w->h && w->of_h == kind)) {
        for (int b = begin; b < count; b++) prepare(kind, x + b * x_stride, n, w->input + b * room);
        w->of_h = x == w->h ? kind : -1;
    }
    for (int r = first, rows; r < last; r += rows) {
        /* A single product with floats takes no time beside that of reading them in order. */
        int alone = kind == FLOAT32 && count - begin == 1;
        rows = last - r < ROWS || alone ? 1 : ROWS;
        for (int b = begin, inputs; b < count; b += inputs) {
            inputs = count - b < INPUTS ? count - b : INPUTS;
            const char *at = (const char *)m->weight.at + r * row;
            tile(kind, rows, inputs, b == begin, at, n, in + b * stride, stride, out);
            put(m, r, rows, inputs, out, y + b * y_stride, y_stride, add);
        }
    }
    for (int u = 0; u < m->n_updates; u++)
        add_update(w, &m->updates[u], n, first, last, begin, x, x_stride, y, y_stride);
}

static void normalise(const Norm *norm, int kind, float eps, const float *x, int n, float *out) {
    Floats total = {0}, squares = {0};
    for (int i = 0; i < n && kind == LAYERNORM; i += LANES) total += load_some(FLOAT32, x, i, n - i, 0);
    float mean = sum(total) / n;
    for (int i = 0; i < n; i += LANES) {
        Floats rest = load_some(FLOAT32, x, i, n - i, mean) - mean;
        squares += rest * rest;
    }
    float scale = 1 / sqrtf(sum(squares) / n + eps);
    for (int i = 0; i < n; i++)
        out[i] = (x[i] - mean) * scale * number_at(norm->weight, i)
            + (norm->bias.at ? number_at(norm->bias, i) : 0);
}

/* Each worker normalises all tokens from `begin` on for itself: that is less work than to wait for
   another. */
static const float *normalised(Worker *w, const Norm *norm, int begin) {
    const Model *m = w->pool->model;
    for (size_t b = begin; b < (size_t)w->pool->count; b++)
        normalise(norm, m->norm, m->eps, w->pool->x + b * m->width, m->width, w->h + b * m->width);
    w->of_h = -1;
    return w->h;
}

static void embed(const Worker *w) {
    const Pool *p = w->pool;
    const Model *m = p->model;
    size_t n = m->width;
    int half = m->head_dim / 2;
    for (int b = w->number; b < p->count; b += p->threads) {
        float *x = p->x + b * n, *turns = p->turns + (size_t)b * m->head_dim;
        const int64_t *ids = p->ids + (size_t)b * (1 + m->n_prev);
        int position = p->tokens[b].position;
        memset(x, 0, n * sizeof *x);
        add_row(m->embedding.weight, ids[0], n, x);
        for (int d = 0; d < m->n_prev && d < position; d++)
            add_row(m->prev_embeddings[d].weight, ids[1 + d], n, x);
        if (m->positions == LEARNED) add_row(m->learned->weight, position, n, x);
        else for (int i = 0; i < half; i++) {
            float angle = (float)position * m->frequencies[i];
            turns[i] = cosf(angle), turns[half + i] = sinf(angle);
        }
    }
}

/* Turns pair (i, i + D/2) of a head by its angle. */
static void rotate(const Model *m, float *head, const float *turns) {
    int half = m->head_dim / 2;
    for (int i = 0; i < half; i++) {
        float c = turns[i], s = turns[half + i], one = head[i], other = head[i + half];
        head[i] = one * c - other * s;
        head[i + half] = other * c + one * s;
    }
}

static void prepare_head(const Pool *p, const Norm *norm, float *head, int token) {
    const Model *m = p->model;
    if (norm->weight.at) normalise(norm, RMSNORM, m->eps, head, m->head_dim, head);
    if (m->positions == ROTARY) rotate(m, head, p->turns + (size_t)token * m->head_dim);
}

static void store(Numbers cache, size_t at, const float *from, int n) {
    if (cache.kind == FLOAT32) memcpy((float *)cache.at + at, from, n * sizeof *from);
    else for (int i = 0; i < n; i++) ((uint16_t *)cache.at + at)[i] = as_bfloat16(from[i]);
}

enum { KEYS, VALUES };

/* The keys or the values of a group in a token's text, (length, D). */
static Numbers cache_of(const Pool *p, const Token *token, int layer, int which, int group) {
    const Model *m = p->model;
    const Cache *cache = &p->caches[token->cache];
    size_t numbers = (size_t)group * cache->length * m->head_dim;
    size_t bytes = numbers * (m->cache_kind == FLOAT32 ? 4 : 2);
    return (Numbers){cache->layers[2 * layer + which] + bytes, m->cache_kind};
}

/* softmax(q kᵀ / √D) v of some query heads of one group, over its S keys. */
static void attend(
    const Worker *w, const float *q, int heads, Numbers keys, Numbers values, int n_keys, float *y) {
    const Model *m = w->pool->model;
    int d = m->head_dim, kind = keys.kind;
    size_t room = room_for(kind, d), stride = room ? room : d * sizeof *q;
    const char *in = room ? w->input : (const char *)q;
    float scale = 1 / sqrtf((float)d);
    for (int h = 0; h < heads && room; h++) prepare(kind, q + h * d, d, w->input + h * room);
    for (int s = 0, rows; s < n_keys; s += rows) {
        const char *at = (const char *)keys.at + s * row_bytes(kind, d);
        rows = n_keys - s < ROWS ? 1 : ROWS;
        for (int h = 0, inputs; h < heads; h += inputs) {
            Tile out;
            inputs = heads - h < INPUTS ? heads - h : INPUTS;
            tile(kind, rows, inputs, 0, at, d, in + h * stride, stride, out);
            for (int i = 0; i < inputs; i++)
                for (int r = 0; r < rows; r++)
                    w->scores[(size_t)(h + i) * m->max_length + s + r] = out[r][i] * scale;
        }
    }
    for (int h = 0; h < heads; h++, y += d) {
        float *scores = w->scores + (size_t)h * m->max_length;
        float total = exponentials(scores, n_keys, largest_of(scores, n_keys));
        weighted_sum(values, n_keys, d, scores, y);
        for (int i = 0; i < d; i++) y[i] /= total;
    }
}

/* Puts the keys and values of all new tokens into the cache, before any of them looks there. */
static void store_keys(const Worker *w, int layer) {
    const Pool *p = w->pool;
    const Model *m = p->model;
    int d = m->head_dim, groups = m->kv_heads;
    for (int task = w->number; task < p->count * groups; task += p->threads) {
        const Token *token = &p->tokens[task / groups];
        size_t at = (size_t)token->position * d;
        float *k = p->k + (size_t)task * d;
        prepare_head(p, &m->layers[layer].k_norm, k, task / groups);
        store(cache_of(p, token, layer, KEYS, task % groups), at, k, d);
        store(cache_of(p, token, layer, VALUES, task % groups), at, p->v + (size_t)task * d, d);
    }
}

/* Each head of each new token from `begin` on looks at its own text, up to its own position; heads
   that share their keys at once, unless that would leave a worker without any. */
static void attention(const Worker *w, int layer, int begin) {
    const Pool *p = w->pool;
    const Model *m = p->model;
    int per_group = m->heads / m->kv_heads, d = m->head_dim;
    int heads = (p->count - begin) * m->kv_heads < 4 * p->threads ? 1 : per_group;
    int tasks = m->heads / heads;       /* of a token */
    for (int task = begin * tasks + w->number; task < p->count * tasks; task += p->threads) {
        const Token *token = &p->tokens[task / tasks];
        int group = task % tasks * heads / per_group;
        Numbers keys = cache_of(p, token, layer, KEYS, group);
        Numbers values = cache_of(p, token, layer, VALUES, group);
        size_t at = (size_t)task * heads * d;
        for (int h = 0; h < heads; h++)
            prepare_head(p, &m->layers[layer].q_norm, p->q + at + h * d, task / tasks);
        attend(w, p->q + at, heads, keys, values, token->position + 1, p->y + at);
    }
}

static float activation(int kind, float x) {
    if (kind == GELU) return 0.5f * x * (1 + erff(x * 0.70710678f));
    return x < 0 ? 0 : x * x;  /* RELU2; of NaN: NaN */
}

/* x becomes act(x), or silu(gate) · x. */
static void activate(int kind, float *x, const float *gate, int n) {
    if (kind != SWIGLU && kind != GELU_TANH) {
        for (int i = 0; i < n; i++) x[i] = activation(kind, x[i]);
        return;
    }
    for (int i = 0; i < n; i += LANES) {
        Floats numbers = load_some(FLOAT32, x, i, n - i, 0), a = numbers, b;
        if (kind == SWIGLU) a = load_some(FLOAT32, gate, i, n - i, 0), b = a, a *= numbers;
        else b = 1.59576912f * (a + 0.044715f * a * a * a);  /* tanh by e to the power of -2 · */
        store_some(x + i, n - i, a / (1 + exponential(-b)));
    }
}

/* Rows first … last of the feed-forward's inner numbers: act(up x), or silu(gate x) · up x. */
static void inner(Worker *w, const Layer *layer, int begin, const float *h, float *gate) {
    const Pool *p = w->pool;
    const Model *m = p->model;
    int first, last;
    product(w, &layer->up, begin, h, m->width, p->inner, m->inner, 0);
    if (m->mlp == SWIGLU) product(w, &layer->gate, begin, h, m->width, gate, m->inner, 0);
    share(w, m->inner, &first, &last);
    for (int b = begin; b < p->count; b++) {
        size_t at = (size_t)b * m->inner + first;
        activate(m->mlp, p->inner + at, gate + at, last - first);
    }
}

static void step(Worker *w) {
    Pool *p = w->pool;
    const Model *m = p->model;
    int q_width = m->heads * m->head_dim, kv_width = m->kv_heads * m->head_dim;
    int wanted = p->count - p->wanted;  /* the first token whose logits are wanted */
    float *gate = p->y;                 /* free when the feed-forward needs it */
    embed(w);
    barrier(p);
    for (int i = 0; i < m->n_layer; i++) {
        const Layer *layer = &m->layers[i];
        /* Of the other tokens the last layer needs the keys and values, and no more. */
        int begin = i == m->n_layer - 1 ? wanted : 0;
        const float *h = normalised(w, &layer->input_norm, 0);
        product(w, &layer->k, 0, h, m->width, p->k, kv_width, 0);
        product(w, &layer->v, 0, h, m->width, p->v, kv_width, 0);
        product(w, &layer->q, begin, h, m->width, p->q, q_width, 0);
        barrier(p);
        store_keys(w, i);
        barrier(p);
        attention(w, i, begin);
        barrier(p);
        product(w, &layer->o, begin, p->y, q_width, p->x, m->width, 1);
        barrier(p);
        inner(w, layer, begin, normalised(w, &layer->mlp_norm, begin), gate);
        barrier(p);
        product(w, &layer->down, begin, p->inner, m->inner, p->x, m->width, 1);
        barrier(p);
    }
    float *logits = p->logits - (size_t)wanted * m->vocab;
    const float *h = normalised(w, &m->final_norm, wanted);
    product(w, &m->head, wanted, h, m->width, logits, m->vocab, 0);
    barrier(p);                         /* the last: past it a worker touches nothing of the step */
}

/* ---- what Python calls ---- */

static void *work(void *argument) {
    Worker *w = argument;
    Pool *p = w->pool;
    for (unsigned seen = 0;;) {
        pthread_mutex_lock(&p->lock);
        while (p->round == seen && !p->stopping) pthread_cond_wait(&p->wake, &p->lock);
        int stopping = p->stopping;
        seen = p->round;
        pthread_mutex_unlock(&p->lock);
        if (stopping) return NULL;
        step(w);
    }
}

/* Zeros, or NULL; from a whole line of the processor's cache on, so that no vector lies in two. */
static float *numbers(size_t count) {
    size_t size = (count * sizeof(float) / LINE + 1) * LINE;
    float *all = aligned_alloc(LINE, size);
    if (all) memset(all, 0, size);
    return all;
}

static size_t widest(const Model *m) {
    size_t widest = m->width, heads = (size_t)m->heads * m->head_dim;
    if ((size_t)m->inner > widest) widest = m->inner;
    return heads > widest ? heads : widest;
}

/* A fork has the memory and none of the threads, perhaps with the lock held: it goes on alone. */
static void after_a_fork(Pool *p) {
    if (p->process == getpid()) return;
    p->process = getpid(), p->threads = 1;
    atomic_store(&p->arrived, 0), atomic_store(&p->asleep, 0);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
}

static void free_worker(Worker *w) { free(w->h), free(w->scores), free(w->low), free(w->input); }

void pool_free(Pool *p) {
    after_a_fork(p);
    pthread_mutex_lock(&p->lock);
    p->stopping = 1;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->threads; i++) pthread_join(p->handles[i], NULL);
    for (int i = 0; i < p->threads; i++) free_worker(&p->workers[i]);
    pthread_mutex_destroy(&p->lock), pthread_cond_destroy(&p->wake);
    free(p->x), free(p->q), free(p->k), free(p->v), free(p->y), free(p->inner), free(p->turns);
    free(p->handles), free(p->workers), free(p);
}

/* Makes a worker and, but for the first, which is the caller, its thread; returns whether it could,
   and leaves nothing behind where it could not. */
static int add_worker(Pool *p) {
    const Model *m = p->model;
    int i = p->threads;
    Worker *w = &p->workers[i];
    *w = (Worker){
        p, i, numbers((size_t)p->most * m->width),
        numbers((size_t)m->heads / m->kv_heads * m->max_length), numbers(m->max_rank),
        (char *)numbers(p->most * widest(m)), -1};
    int there = w->h && w->scores && w->low && w->input;
    if (there && i) there = !pthread_create(&p->handles[i], NULL, work, w);
    if (there) p->threads++;
    else free_worker(w);
    return there;
}

/* Threads and buffers for steps of at most so many tokens: as many threads as are wanted, or as the
   system gives; NULL where there is no memory. */
Pool *pool_make(const Model *m, int most, int threads) {
    Pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    size_t wide = most * widest(m);
    p->model = m, p->most = most, p->process = getpid();
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->handles = calloc(threads, sizeof *p->handles);
    p->workers = calloc(threads, sizeof *p->workers);
    p->x = numbers(wide), p->q = numbers(wide), p->k = numbers(wide);
    p->v = numbers(wide), p->y = numbers(wide), p->inner = numbers(wide);
    p->turns = numbers((size_t)most * m->head_dim);
    int there = p->handles && p->workers && p->x && p->q && p->k && p->v && p->y && p->inner && p->turns;
    while (there && p->threads < threads && add_worker(p)) continue;
    if (p->threads) return p;
    pool_free(p);
    return NULL;
}

/* Takes the caches of some texts, `count` new tokens of theirs, and the ids of those; writes the
   logits (wanted, V) after the last of them. Returns whether every id is one of the vocabulary;
   nothing is done where one is not. */
int pool_step(
    Pool *p, const Cache *caches, const Token *tokens, const int64_t *ids, int count, int wanted,
    float *logits) {
    for (int i = 0; i < count * (1 + p->model->n_prev); i++)
        if (ids[i] < 0 || ids[i] >= p->model->vocab) return 0;
    after_a_fork(p);
    p->caches = caches, p->tokens = tokens, p->ids = ids;
    p->count = count, p->wanted = wanted, p->logits = logits;
    pthread_mutex_lock(&p->lock);
    p->round++;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    step(&p->workers[0]);
    return 1;
}
