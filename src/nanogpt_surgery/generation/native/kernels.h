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
typedef int32_t Whole __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
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
    Words words;
#if defined(__AVX2__) && !defined(__AVX512F__)
    words = (Words)_mm256_cvtepu16_epi32((__m128i)shorts);  /* gcc would take two halves */
#else
    words = __builtin_convertvector(shorts, Words);
#endif
    return (Floats)(words << 16);
}

static inline float number_at(Numbers from, size_t at) {
    return from.kind == FLOAT32 ? ((const float *)from.at)[at]
                                : as_float(((const uint16_t *)from.at)[at]);
}

/* a · b + c, rounded once where the machine can. The compiler would choose anew at each place, and a
   sum would depend on the tile it is computed in. */
static inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline Floats multiply_add_all(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* Fewer than LANES numbers, `other` in the place of those that are not there. */
static __attribute__((noinline)) Floats load_few(
    int kind, const void *from, size_t at, int count, float other) {
    float numbers[LANES];
    for (int i = 0; i < LANES; i++)
        numbers[i] = i < count ? number_at((Numbers){from, kind}, at + i) : other;
    return load(FLOAT32, numbers, 0);
}

static inline Floats load_some(int kind, const void *from, size_t at, int count, float other) {
    return count >= LANES ? load(kind, from, at) : load_few(kind, from, at, count, other);
}

static inline void store_some(float *to, int count, Floats numbers) {
    if (count >= LANES) *(Floats *)to = numbers;
    else memcpy(to, &numbers, count * sizeof *to);
}

/* The sum of 8 numbers, in the same order on every machine. */
static inline float sum_of_8(const float *n) {
    return ((n[0] + n[4]) + (n[2] + n[6])) + ((n[1] + n[5]) + (n[3] + n[7]));
}

#if defined(__AVX2__)
static inline float sum_of_lanes(__m256 n) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(n), _mm256_extractf128_ps(n, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

static inline float sum(Floats numbers) {
#if defined(__AVX512F__)
    __m512 all = (__m512)numbers;
    __m256d upper = _mm512_extractf64x4_pd(_mm512_castps_pd(all), 1);
    return sum_of_lanes(_mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(upper)));
#elif defined(__AVX2__)
    return sum_of_lanes((__m256)numbers);
#else
    float all[LANES];
    memcpy(all, &numbers, sizeof all);
    return sum_of_8(all);
#endif
}

/* A product is computed in tiles: some rows of a matrix times some vectors, so that what is loaded
   is used several times and the sums stay in registers. The order of each sum is that of one row
   and one vector alone. `rows`, `inputs` and `kind` are constants where a tile is inlined. While a
   tile is computed, what lies AHEAD of it is fetched, as many bytes as it reads: several rows read
   side by side are otherwise more streams than the processor foresees. */
enum { ROWS = 3, INPUTS = 4, AHEAD = 16384 };
typedef float Tile[ROWS][INPUTS];
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
/* Keeps what was loaded in a register. Without it gcc loads a number anew for each product that it
   is used in, and a tile of floats takes twice the time. */
#if defined(__AVX2__)
#define IN_REGISTER(vector) __asm__("" : "+v"(vector))
#else
#define IN_REGISTER(vector)
#endif

typedef Floats Sums[ROWS][INPUTS];

/* Adds the products of up to LANES numbers from k on. */
INLINE void add_products(
    int kind, int rows, int inputs, const char *w, size_t row, const char *x, size_t stride,
    size_t k, int count, Sums sums) {
    Floats numbers[ROWS];
    UNROLL for (int r = 0; r < rows; r++) {
        numbers[r] = load_some(kind, w + r * row, k, count, 0);
        IN_REGISTER(numbers[r]);
    }
    UNROLL for (int i = 0; i < inputs; i++) {
        Floats with = load_some(FLOAT32, x + i * stride, k, count, 0);
        IN_REGISTER(with);
        UNROLL for (int r = 0; r < rows; r++)
            sums[r][i] = multiply_add_all(numbers[r], with, sums[r][i]);
    }
}

/* Vectors lie `stride` bytes apart. */
INLINE void tile_of_numbers(
    int kind, int rows, int inputs, int ahead, const char *w, size_t n, const char *x,
    size_t stride, Tile out) {
    Sums sums;
    size_t row = n * (kind == FLOAT32 ? 4 : 2), k = 0, line = kind == FLOAT32 ? 16 : 32;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < inputs; i++) sums[r][i] = (Floats){0};
    for (; k + line <= n; k += line) {
        if (ahead) UNROLL for (int r = 0; r < rows; r++)
            __builtin_prefetch(w + AHEAD + (k / line * rows + r) * 64, 0, 2);
        UNROLL for (size_t at = 0; at < line; at += LANES)
            add_products(kind, rows, inputs, w, row, x, stride, k + at, LANES, sums);
    }
    for (; k < n; k += LANES)
        add_products(kind, rows, inputs, w, row, x, stride, k, n - k, sums);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < inputs; i++) out[r][i] = sum(sums[r][i]);
}

#if defined(__AVX512BF16__)
/* Rows of bfloat16 and vectors rounded to bfloat16 too. */
INLINE void tile_of_bfloat16(
    int rows, int inputs, int ahead, const char *w, size_t n, const char *x, size_t stride,
    Tile out) {
    __m512 sums[ROWS][INPUTS];
    size_t row = n * 2, k = 0;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < inputs; i++) sums[r][i] = _mm512_setzero_ps();
    for (; k + 32 <= n; k += 32) {
        if (ahead) UNROLL for (int r = 0; r < rows; r++)
            __builtin_prefetch(w + AHEAD + (k / 32 * rows + r) * 64, 0, 2);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512bh numbers = (__m512bh)_mm512_loadu_si512(w + r * row + k * 2);
            UNROLL for (int i = 0; i < inputs; i++)
                sums[r][i] = _mm512_dpbf16_ps(
                    sums[r][i], numbers, (__m512bh)_mm512_loadu_si512(x + i * stride + k * 2));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < inputs; i++) {
            float total = sum((Floats)sums[r][i]);
            for (size_t j = k; j < n; j++)
                total = multiply_add(
                    as_float(((const uint16_t *)(w + r * row))[j]),
                    as_float(((const uint16_t *)(x + i * stride))[j]), total);
            out[r][i] = total;
        }
}
#endif

/* One row's product with one vector of floats. */
static float dot(Numbers w, size_t row, size_t n, const float *x) {
    Tile out;
    const char *at = (const char *)w.at + row * n * (w.kind == FLOAT32 ? 4 : 2);
    if (w.kind == FLOAT32) tile_of_numbers(FLOAT32, 1, 1, 0, at, n, (const char *)x, 0, out);
    else tile_of_numbers(BFLOAT16, 1, 1, 0, at, n, (const char *)x, 0, out);
    return out[0][0];
}

/* e to the power of each; 0 below where float32 is normal, and infinity above its range. */
static inline Floats exponential(Floats x) {
    Floats rounder = (Floats){0} + 12582912.0f, y = x * 1.44269504f + rounder;
    Whole power = (Whole)y - (Whole)rounder;
    Floats whole = y - rounder;
    Floats rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    Floats p = ((((rest * 1.9875691e-4f + 1.3981999e-3f) * rest + 8.3334519e-3f) * rest
        + 4.1665796e-2f) * rest + 1.6666665e-1f) * rest + 5.0000001e-1f;
    p = p * rest * rest + rest + 1;
    Whole number = (Whole)p + (power << 23);
    Whole low = x < -87.3f, high = x > 88.7f, nan = x != x;
    number = (number & ~low & ~high) | (high & 0x7f800000);
    return (Floats)((number & ~nan) | (nan & (Whole)x));
}

/* The largest of some numbers; of NaN: any. */
static float largest_of(const float *x, int n) {
    Floats most = (Floats){0} - INFINITY;
    float numbers[LANES], largest = -INFINITY;
    for (int i = 0; i < n; i += LANES) {
        Floats next = load_some(FLOAT32, x, i, n - i, -INFINITY);
        Whole larger = next > most;
        most = (Floats)(((Whole)next & larger) | ((Whole)most & ~larger));
    }
    store_some(numbers, LANES, most);
    for (int i = 0; i < LANES; i++) largest = numbers[i] > largest ? numbers[i] : largest;
    return largest;
}

/* x becomes e to the power of (x - largest); returns the sum. */
static float exponentials(float *x, int n, float largest) {
    Floats total = {0};
    for (int i = 0; i < n; i += LANES) {
        Floats numbers = exponential(load_some(FLOAT32, x, i, n - i, -INFINITY) - largest);
        store_some(x + i, n - i, numbers);
        total += numbers;
    }
    return sum(total);
}

/* y (columns) = Σ weight · row, over the rows of a matrix of floats or bfloat16. */
INLINE void weighted_sum_of(
    int kind, const void *matrix, int rows, int columns, const float *weights, float *y) {
    enum { WIDE = 8 };
    int i = 0;
    for (; i + WIDE * LANES <= columns; i += WIDE * LANES) {
        Floats sums[WIDE];
        UNROLL for (int j = 0; j < WIDE; j++) sums[j] = (Floats){0};
        for (int r = 0; r < rows; r++)
            UNROLL for (int j = 0; j < WIDE; j++)
                sums[j] = multiply_add_all(
                    load(kind, matrix, (size_t)r * columns + i + j * LANES),
                    (Floats){0} + weights[r], sums[j]);
        UNROLL for (int j = 0; j < WIDE; j++) *(Floats *)(y + i + j * LANES) = sums[j];
    }
    for (; i < columns; i += LANES) {
        Floats sums = {0};
        for (int r = 0; r < rows; r++)
            sums += weights[r] * load_some(kind, matrix, (size_t)r * columns + i, columns - i, 0);
        store_some(y + i, columns - i, sums);
    }
}

static void weighted_sum(Numbers matrix, int rows, int columns, const float *weights, float *y) {
    if (matrix.kind == FLOAT32)
        weighted_sum_of(FLOAT32, matrix.at, rows, columns, weights, y);
    else weighted_sum_of(BFLOAT16, matrix.at, rows, columns, weights, y);
}

/* ---- products of blocks ---- */

enum { BLOCK = 32 };

/* A vector beside blocks: its numbers as int8, then the scale of each 32, then the sums of each 32
   with their scale. Blocks are taken in eights; scales and sums beyond the last are 0. */
enum { EIGHT = 8 };
static inline size_t in_eights(size_t n) { return (n / BLOCK + EIGHT - 1) / EIGHT * EIGHT; }

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

/* A block's integers, 32 bytes: those of 4 bits count from 0, their lower halves come first. Their
   products with a vector's are PARTS sums of int32. */
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

typedef __m256i Bytes;

static inline Bytes bytes_of_8_bits(const uint8_t *from) {
    return _mm256_loadu_si256((const void *)from);
}

static inline Bytes bytes_of_4_bits(const uint8_t *from) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)from));
    __m256i shifts = _mm256_set_epi32(4, 4, 4, 4, 0, 0, 0, 0);
    return _mm256_and_si256(_mm256_srlv_epi32(both, shifts), _mm256_set1_epi8(15));
}

static inline Ints products_of_bytes(int is_signed, Bytes w, const int8_t *with) {
    __m256i x = _mm256_loadu_si256((const void *)with);
    if (!is_signed) return products(w, x);
    return products(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
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

typedef int8x16x2_t Bytes;

static inline Bytes bytes_of_8_bits(const uint8_t *from) {
    return (Bytes){{vld1q_s8((const int8_t *)from), vld1q_s8((const int8_t *)from + 16)}};
}

static inline Bytes bytes_of_4_bits(const uint8_t *from) {
    uint8x16_t w = vld1q_u8(from);
    int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
    return (Bytes){{low, vreinterpretq_s8_u8(vshrq_n_u8(w, 4))}};
}

static inline Ints products_of_bytes(int is_signed, Bytes w, const int8_t *with) {
    (void)is_signed;
    return products(w.val[0], w.val[1], with);
}
#else
#define PARTS 4
typedef int32_t Ints __attribute__((vector_size(16)));

typedef struct {
    int8_t at[BLOCK];
} Bytes;

static inline Bytes bytes_of_8_bits(const uint8_t *from) {
    Bytes bytes;
    memcpy(bytes.at, from, BLOCK);
    return bytes;
}

static inline Bytes bytes_of_4_bits(const uint8_t *from) {
    Bytes bytes;
    for (int i = 0; i < BLOCK / 2; i++)
        bytes.at[i] = from[i] & 15, bytes.at[i + BLOCK / 2] = from[i] >> 4;
    return bytes;
}

static inline Ints products_of_bytes(int is_signed, Bytes w, const int8_t *with) {
    Ints sums = {0};
    (void)is_signed;
    for (int i = 0; i < BLOCK; i++) sums[i % PARTS] += w.at[i] * with[i];
    return sums;
}
#endif
typedef float Parts __attribute__((vector_size(4 * PARTS)));

static inline Parts multiply_add_parts(Parts a, float b, Parts c) {
#if defined(__FMA__)
    return (Parts)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
#else
    return a * b + c;
#endif
}

static inline float sum_of_parts(Parts parts) {
#if defined(__AVX2__)
    return sum_of_lanes((__m256)parts);
#else
    return (parts[0] + parts[2]) + (parts[1] + parts[3]);
#endif
}

typedef float Eights __attribute__((vector_size(4 * EIGHT), aligned(4), may_alias));

/* The float16 at the same place in up to EIGHT blocks of a row; 0 in the place of those beyond. */
INLINE Eights halves_at(const uint8_t *from, size_t size, size_t count) {
#if defined(__F16C__) && defined(__AVX2__)
    if (count >= EIGHT) {
        /* Each is loaded to where it belongs: block j from 2 j bytes before it. */
#define HALF(J) _mm_loadu_si128((const void *)(from + J * (size - 2)))
        __m128i one = _mm_blend_epi16(HALF(0), HALF(1), 2), two = _mm_blend_epi16(HALF(2), HALF(3), 8);
        __m128i three = _mm_blend_epi16(HALF(4), HALF(5), 32);
        __m128i four = _mm_blend_epi16(HALF(6), HALF(7), 128);
        one = _mm_blend_epi16(one, two, 12), three = _mm_blend_epi16(three, four, 192);
        return (Eights)_mm256_cvtph_ps(_mm_blend_epi16(one, three, 240));
    }
#endif
    Eights halves = {0};
    for (size_t j = 0; j < EIGHT && j < count; j++) halves[j] = half_at(from + j * size);
    return halves;
}

static inline Eights multiply_add_eights(Eights a, Eights b, Eights c) {
#if defined(__FMA__)
    return (Eights)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* The scales of both sides are multiplied first, EIGHT at once, for up to CHUNK blocks of a row. */
enum { CHUNK = 64 };
INLINE void tile_of_blocks(
    int kind, int rows, int inputs, int ahead, const char *w, size_t n, const char *x,
    size_t stride, Tile out) {
    Parts sums[ROWS][INPUTS];
    Eights rest[ROWS][INPUTS];
    float factors[ROWS][INPUTS][CHUNK];
    size_t size = block_bytes(kind), blocks = n / BLOCK, row = blocks * size;
    const char *next = w + AHEAD, *scales = x + n;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < inputs; i++) sums[r][i] = (Parts){0}, rest[r][i] = (Eights){0};
    for (size_t first = 0; first < blocks; first += CHUNK) {
        size_t count = blocks - first < CHUNK ? blocks - first : CHUNK;
        for (size_t b = 0; b < count; b += EIGHT)
            UNROLL for (int r = 0; r < rows; r++) {
                const uint8_t *at = (const uint8_t *)w + r * row + (first + b) * size;
                Eights scale = halves_at(at, size, count - b), least = scale;
                if (kind == Q4_1) least = halves_at(at + 2, size, count - b);
                UNROLL for (int i = 0; i < inputs; i++) {
                    const float *with = (const float *)(scales + i * stride) + first + b;
                    Eights totals = *(const Eights *)(with + in_eights(n));
                    *(Eights *)(factors[r][i] + b) = scale * *(const Eights *)with;
                    if (kind != Q8_0) rest[r][i] = multiply_add_eights(least, totals, rest[r][i]);
                }
            }
        for (size_t b = 0; b < count; b++) {
            size_t all = first + b;
            if (ahead) for (size_t byte = 0; byte < rows * size; byte += 64)
                __builtin_prefetch(next + all * rows * size + byte, 0, 2);
            UNROLL for (int r = 0; r < rows; r++) {
                const uint8_t *at = (const uint8_t *)w + r * row + all * size;
                Bytes bytes = kind == Q8_0 ? bytes_of_8_bits(at + 2)
                                           : bytes_of_4_bits(at + (kind == Q4_1 ? 4 : 2));
                UNROLL for (int i = 0; i < inputs; i++) {
                    const int8_t *with = (const int8_t *)x + i * stride + all * BLOCK;
                    Ints ints = products_of_bytes(kind == Q8_0, bytes, with);
                    Parts numbers = __builtin_convertvector(ints, Parts);
                    sums[r][i] = multiply_add_parts(numbers, factors[r][i][b], sums[r][i]);
                }
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < inputs; i++)
            out[r][i] = sum_of_parts(sums[r][i])
                + (kind == Q8_0 ? 0 : (kind == Q4_0 ? -8 : 1) * sum_of_8((const float *)&rest[r][i]));
}

/* Rounds 32 numbers: the largest becomes 127. Of one that is not finite the products are NaN. */
static void round_block(const float *x, int8_t *to, float *scale, float *sum) {
    uint32_t words[BLOCK], most = 0;    /* those of sizes are in the order of the sizes */
    float largest;
    memcpy(words, x, sizeof words);
    for (int i = 0; i < BLOCK; i++) words[i] &= 0x7fffffff;
    for (int i = 0; i < BLOCK; i++) most = words[i] > most ? words[i] : most;
    memcpy(&largest, &most, 4);
    int finite = largest <= FLT_MAX, total = 0;
    float by = finite && largest > 1e-30f ? 127 / largest : 0;
    for (int i = 0; i < BLOCK; i++) {
        int number = by ? (int)rintf(x[i] * by) : 0;
        to[i] = (int8_t)number;
        total += number;
    }
    *scale = finite ? by ? largest / 127 : 0 : NAN;
    *sum = *scale * (float)total;
}

/* ---- a matrix and a vector ---- */

/* The bytes of n numbers of a vector as the product with a matrix of a kind takes them: none where
   it takes them as they are. */
static inline size_t room_for(int kind, size_t n) {
    if (kind >= Q8_0) return n + 2 * in_eights(n) * sizeof(float);
#if defined(__AVX512BF16__)
    if (kind == BFLOAT16) return (2 * n + 3) / 4 * 4;
#endif
    return 0;
}

static void prepare(int kind, const float *x, size_t n, void *room) {
    if (kind >= Q8_0) {
        float *scales = (float *)((char *)room + n), *totals = scales + in_eights(n);
        memset(scales, 0, 2 * in_eights(n) * sizeof *scales);
        for (size_t b = 0; b < n / BLOCK; b++)
            round_block(x + b * BLOCK, (int8_t *)room + b * BLOCK, scales + b, totals + b);
    } else
        for (size_t i = 0; i < n; i++) ((uint16_t *)room)[i] = as_bfloat16(x[i]);
}

/* How many bytes a row of a matrix takes. */
static inline size_t row_bytes(int kind, size_t n) {
    return kind >= Q8_0 ? n / BLOCK * block_bytes(kind) : n * (kind == FLOAT32 ? 4 : 2);
}

INLINE void tile_of(
    int kind, int rows, int inputs, int ahead, const char *w, size_t n, const char *x,
    size_t stride, Tile out) {
    if (kind >= Q8_0) tile_of_blocks(kind, rows, inputs, ahead, w, n, x, stride, out);
#if defined(__AVX512BF16__)
    else if (kind == BFLOAT16) tile_of_bfloat16(rows, inputs, ahead, w, n, x, stride, out);
#endif
    else tile_of_numbers(kind, rows, inputs, ahead, w, n, x, stride, out);
}

/* One row or ROWS rows of a matrix, from `w` on, times one to INPUTS vectors as `prepare` has made
   them; `ahead`: to fetch the rows that follow. */
static void tile(
    int kind, int rows, int inputs, int ahead, const char *w, size_t n, const char *x,
    size_t stride, Tile out) {
#define CASE(K, R, I) \
    case (K * 2 + (R > 1)) * INPUTS + I - 1: tile_of(K, R, I, ahead, w, n, x, stride, out); break;
#define CASES(K, R) CASE(K, R, 1) CASE(K, R, 2) CASE(K, R, 3) CASE(K, R, 4)
    switch ((kind * 2 + (rows > 1)) * INPUTS + inputs - 1) {
        CASES(FLOAT32, 1) CASES(BFLOAT16, 1) CASES(Q8_0, 1) CASES(Q4_0, 1) CASES(Q4_1, 1)
        CASES(FLOAT32, ROWS) CASES(BFLOAT16, ROWS) CASES(Q8_0, ROWS) CASES(Q4_0, ROWS)
        CASES(Q4_1, ROWS)
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
