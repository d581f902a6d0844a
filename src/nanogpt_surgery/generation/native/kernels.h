/* Numbers as they lie in a model's memory, and their products with a vector: what decoder.c spends
   its time on. Vectors are the compiler's own, as wide as the machine's; beside them stand a few
   functions an instruction set, for products of small integers and of bfloat16.

   Numbers of few bits lie in blocks of 32 along a row, as in a GGUF file: 32 int8 with a scale in
   float16 (Q8_0), 32 of 4 bits less 8 with a scale (Q4_0), or with a scale and a smallest number
   (Q4_1); the lower halves of 16 bytes are the first 16 numbers. For a product with these the
   vector is rounded once to int8, in blocks of 32 with scales of their own. The products of the
   integers are the same on every machine; only the sums of blocks round in an order of their own. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { FLOAT32, BFLOAT16, Q8_0, Q4_0, Q4_1 };

/* Numbers as they lie in PyTorch's memory: nothing is copied, so nothing can be stale. */
typedef struct {
    const void *at;                     /* or NULL where there are none */
    int32_t kind;
} Numbers;

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline float as_float(uint16_t bfloat16) {
    uint32_t word = (uint32_t)bfloat16 << 16;
    float number;
    memcpy(&number, &word, 4);
    return number;
}

/* To the nearest bfloat16, ties to even, as PyTorch rounds. */
static inline uint16_t as_bfloat16(float number) {
    uint32_t word;
    memcpy(&word, &number, 4);
    if (number != number) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

/* Not by memcpy: gcc would copy halves of a vector to the stack and wait to read them as one. */
static inline Floats load(int kind, const void *from, size_t at) {
    if (kind == FLOAT32) return *(const Floats *)((const float *)from + at);
    Shorts shorts = *(const Shorts *)((const uint16_t *)from + at);
    Words words = __builtin_convertvector(shorts, Words) << 16;
    return (Floats)words;
}

static inline float number_at(Numbers from, size_t at) {
    return from.kind == FLOAT32 ? ((const float *)from.at)[at]
                                : as_float(((const uint16_t *)from.at)[at]);
}

static inline float sum(Floats numbers) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += numbers[i];
    return total;
}

/* A row's product with a vector, in four sums that hide the latency; `kind` is a constant where this
   is inlined. Rows are read one after the other: from four streams side by side, as there were once
   for the vector to be read but once, memory gave a third to a half of it. */
static inline __attribute__((always_inline)) float dot_of(
    int kind, const void *weight, size_t row, size_t n, const float *x) {
    Floats sums[4] = {{0}};
    size_t at = row * n, k = 0;
    for (; k + 4 * LANES <= n; k += 4 * LANES)
        for (int i = 0; i < 4; i++)
            sums[i] += load(kind, weight, at + k + i * LANES) * load(FLOAT32, x, k + i * LANES);
    for (; k + LANES <= n; k += LANES)
        sums[0] += load(kind, weight, at + k) * load(FLOAT32, x, k);
    float total = sum(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; k < n; k++) total += number_at((Numbers){weight, kind}, at + k) * x[k];
    return total;
}

static float dot(Numbers w, size_t row, size_t n, const float *x) {
    return w.kind == FLOAT32 ? dot_of(FLOAT32, w.at, row, n, x)
                             : dot_of(BFLOAT16, w.at, row, n, x);
}

#if defined(__AVX512BF16__)
/* A row of bfloat16 and a vector rounded to bfloat16 too, 32 numbers at a time. */
static inline float dot_of_bfloat16(const uint16_t *w, size_t n, const uint16_t *x) {
    __m512 sums[4] = {{0}};
    size_t k = 0;
    for (int i = 0; k + 32 <= n; k += 32, i = (i + 1) % 4) {
        __m512bh numbers = (__m512bh)_mm512_loadu_si512(w + k);
        sums[i] = _mm512_dpbf16_ps(sums[i], numbers, (__m512bh)_mm512_loadu_si512(x + k));
    }
    float total = _mm512_reduce_add_ps(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; k < n; k++) total += as_float(w[k]) * as_float(x[k]);
    return total;
}
#endif

/* ---- products of blocks ---- */

enum { BLOCK = 32 };

/* 32 numbers of a vector: `scale` times an int8 each, of which `total` is the sum. */
typedef struct {
    float scale, total;
    int8_t at[BLOCK];
} Block;

static inline size_t block_bytes(int kind) { return kind == Q8_0 ? 34 : kind == Q4_0 ? 18 : 20; }

static inline float half_at(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, 2);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, word;
    float number;
    if (rest >= 0x7c00) word = 0x7f800000 | (rest & 0x3ff) << 13;  /* infinity and NaN */
    else if (rest >= 0x400) word = (rest + (112 << 10)) << 13;
    else return (sign ? -1 : 1) * (float)rest * 0x1p-24f;  /* smaller than a normal number */
    word |= sign;
    memcpy(&number, &word, 4);
    return number;
#endif
}

/* A block's integers times a vector's, in PARTS sums of int32; those of 4 bits count from 0. */
#if defined(__AVX2__)
#define PARTS 8
typedef int32_t Ints __attribute__((vector_size(32)));

/* Bytes without a sign times bytes with one. */
static inline Ints products(__m256i w, __m256i x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (Ints)_mm256_dpbusd_epi32(_mm256_setzero_si256(), w, x);
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), w, x);
#else
    return (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1));
#endif
}

static inline Ints products_of_8_bits(const uint8_t *from, const int8_t *with) {
    __m256i w = _mm256_loadu_si256((const void *)from), x = _mm256_loadu_si256((const void *)with);
    return products(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}

static inline Ints products_of_4_bits(const uint8_t *from, const int8_t *with) {
    __m128i w = _mm_loadu_si128((const void *)from);
    __m256i both = _mm256_set_m128i(_mm_srli_epi16(w, 4), w);
    __m256i x = _mm256_loadu_si256((const void *)with);
    return products(_mm256_and_si256(both, _mm256_set1_epi8(15)), x);
}
#elif defined(__ARM_NEON)
#define PARTS 4
typedef int32_t Ints __attribute__((vector_size(16)));

static inline Ints products(int8x16_t w, int8x16_t v, const int8_t *with) {
    int8x16_t x = vld1q_s8(with), y = vld1q_s8(with + 16);
#if defined(__ARM_FEATURE_DOTPROD)
    return (Ints)vdotq_s32(vdotq_s32(vdupq_n_s32(0), w, x), v, y);
#else
    int16x8_t first = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    int16x8_t second = vmull_s8(vget_low_s8(v), vget_low_s8(y));
    first = vmlal_s8(first, vget_high_s8(w), vget_high_s8(x));
    second = vmlal_s8(second, vget_high_s8(v), vget_high_s8(y));
    return (Ints)vpadalq_s16(vpaddlq_s16(first), second);
#endif
}

static inline Ints products_of_8_bits(const uint8_t *from, const int8_t *with) {
    return products(vld1q_s8((const int8_t *)from), vld1q_s8((const int8_t *)from + 16), with);
}

static inline Ints products_of_4_bits(const uint8_t *from, const int8_t *with) {
    uint8x16_t w = vld1q_u8(from);
    int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
    return products(low, vreinterpretq_s8_u8(vshrq_n_u8(w, 4)), with);
}
#else
#define PARTS 4
typedef int32_t Ints __attribute__((vector_size(16)));

static inline Ints products_of_8_bits(const uint8_t *from, const int8_t *with) {
    Ints sums = {0};
    for (int i = 0; i < BLOCK; i++) sums[i % PARTS] += (int8_t)from[i] * with[i];
    return sums;
}

static inline Ints products_of_4_bits(const uint8_t *from, const int8_t *with) {
    Ints sums = {0};
    for (int i = 0; i < BLOCK / 2; i++)
        sums[i % PARTS] += (from[i] & 15) * with[i] + (from[i] >> 4) * with[i + BLOCK / 2];
    return sums;
}
#endif
typedef float Parts __attribute__((vector_size(4 * PARTS)));

/* A row's product with a vector; `kind` is a constant where this is inlined. */
static inline __attribute__((always_inline)) float dot_of_blocks(
    int kind, const uint8_t *at, size_t n_blocks, const Block *x) {
    Parts sums = {0};
    float rest = 0;
    for (const Block *end = x + n_blocks; x < end; x++, at += block_bytes(kind)) {
        const uint8_t *numbers = at + (kind == Q4_1 ? 4 : 2);
        float scale = half_at(at) * x->scale;
        Ints ints = kind == Q8_0 ? products_of_8_bits(numbers, x->at)
                                 : products_of_4_bits(numbers, x->at);
        sums += __builtin_convertvector(ints, Parts) * scale;
        if (kind == Q4_0) rest -= 8 * scale * x->total;
        if (kind == Q4_1) rest += half_at(at + 2) * x->scale * x->total;
    }
    for (int i = 0; i < PARTS; i++) rest += sums[i];
    return rest;
}

/* Rounds 32 numbers: the largest becomes 127. Of one that is not finite the products are NaN. */
static Block rounded(const float *x) {
    Block block = {0};
    float largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        float size = fabsf(x[i]);
        if (!(size <= largest)) largest = size;
    }
    if (!(largest <= FLT_MAX)) block.scale = NAN;
    if (!(largest > 1e-30f && largest <= FLT_MAX)) return block;
    float by = 127 / largest;
    int total = 0;
    for (int i = 0; i < BLOCK; i++) {
        int number = (int)rintf(x[i] * by);
        block.at[i] = (int8_t)number;
        total += number;
    }
    block.scale = largest / 127, block.total = (float)total;
    return block;
}

/* ---- a matrix and a vector ---- */

/* The bytes of n numbers of a vector as the product with a matrix of a kind takes them: none where
   it takes them as they are. */
static inline size_t room_for(int kind, size_t n) {
    if (kind >= Q8_0) return n / BLOCK * sizeof(Block);
#if defined(__AVX512BF16__)
    if (kind == BFLOAT16) return (2 * n + 3) / 4 * 4;
#endif
    return 0;
}

static void prepare(int kind, const float *x, size_t n, void *room) {
    if (kind >= Q8_0)
        for (size_t b = 0; b < n / BLOCK; b++) ((Block *)room)[b] = rounded(x + b * BLOCK);
    else
        for (size_t i = 0; i < n; i++) ((uint16_t *)room)[i] = as_bfloat16(x[i]);
}

/* A row's product with a vector as `prepare` has made it. */
static float product_of_row(Numbers w, size_t row, size_t n, const void *x) {
    size_t n_blocks = n / BLOCK;
    const uint8_t *at = (const uint8_t *)w.at + row * n_blocks * block_bytes(w.kind);
    switch (w.kind) {
    case Q8_0: return dot_of_blocks(Q8_0, at, n_blocks, x);
    case Q4_0: return dot_of_blocks(Q4_0, at, n_blocks, x);
    case Q4_1: return dot_of_blocks(Q4_1, at, n_blocks, x);
#if defined(__AVX512BF16__)
    case BFLOAT16: return dot_of_bfloat16((const uint16_t *)w.at + row * n, n, x);
#endif
    default: return dot(w, row, n, x);
    }
}

/* Adds one row to a vector. */
static void add_row(Numbers w, size_t row, size_t n, float *x) {
    size_t size = block_bytes(w.kind);
    if (w.kind < Q8_0)
        for (size_t i = 0; i < n; i++) x[i] += number_at(w, row * n + i);
    else
        for (size_t i = 0; i < n; i++) {
            const uint8_t *at = (const uint8_t *)w.at + (row * n + i) / BLOCK * size;
            int place = (int)(i % BLOCK), half = BLOCK / 2;
            int byte = at[size - (w.kind == Q8_0 ? BLOCK : half) + place % (w.kind == Q8_0 ? BLOCK : half)];
            int bits = place < half ? byte & 15 : byte >> 4;
            float scale = half_at(at);
            x[i] += w.kind == Q8_0 ? scale * (int8_t)byte
                : w.kind == Q4_0 ? scale * (bits - 8) : scale * bits + half_at(at + 2);
        }
}
