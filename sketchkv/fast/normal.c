/* Vectors in the codes of `sketchkv.quantize.Normal`: packed levels and one float16 scale each. Constants as of cpu.c, which
 * includes it. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    uint8_t *codes;   /* [rows, slots, DIM * bits / 8] */
    uint16_t *scales; /* float16 [rows, slots] */
    const float *levels, *bounds;
} Coded;

INLINE float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t to_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float from_half(uint16_t half)
{
    uint32_t exponent = half >> 10 & 31, rest = half & 1023, sign = (uint32_t)(half & 0x8000) << 16;
    float normal = from_bits((exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13);
    float x = exponent ? normal : (float)rest * 0x1p-24f;
    return from_bits(to_bits(x) | sign);
}

/* Rounds to the nearest, ties to even. */
INLINE uint16_t to_half(float x)
{
    uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) /* 65520 */
        return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) /* 2^-14 */
        return (uint16_t)(sign | (uint32_t)lrintf(from_bits(size) * 0x1p24f));
    size += 0xfff + (size >> 13 & 1);
    return (uint16_t)(sign | (size - (112u << 23)) >> 13);
}

/* exp(x) of x <= 0; 0 where the result would be denormal, NaN of NaN. */
INLINE float exponential(float x)
{
    float y = x < -87.0f ? -87.0f : x, shifted = y * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = y - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    float power = from_bits((to_bits(shifted) << 23) + 0x3f800000);
    return x < -87.0f ? 0.0f : p * power;
}

INLINE float dot(const float *a, const float *b)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < DIM; c++)
        sum += a[c] * b[c];
    return sum;
}

INLINE void add(float *out, float factor, const float *x)
{
#pragma omp simd
    for (int c = 0; c < DIM; c++)
        out[c] += factor * x[c];
}

/* As many numbers as a register holds, at any address. */
typedef float Wide __attribute__((vector_size(64), aligned(4), may_alias));
enum { LANES = 16, BLOCK = 2 * LANES, WIDTH = (DIM + LANES - 1) / LANES * LANES, TOGETHER = 4 };

/* Sums of `values` [used, WIDTH], weighted by `weight` [few, stride], to `out` [few, DIM]. */
INLINE void sums(int few, const float *values, int64_t used, const float *weight, int64_t stride, float *out)
{
    for (int start = 0; start < WIDTH; start += TOGETHER * LANES) {
        Wide sum[TOGETHER][TOGETHER] = {{{0}}};
        const int parts = (WIDTH - start) / LANES < TOGETHER ? (WIDTH - start) / LANES : TOGETHER;
        for (int64_t i = 0; i < used; i++)
            for (int part = 0; part < parts; part++) {
                Wide value = *(const Wide *)(values + i * WIDTH + start + part * LANES);
                for (int g = 0; g < few; g++)
                    sum[g][part] += weight[g * stride + i] * value;
            }
        for (int g = 0; g < few; g++)
            memcpy(out + g * DIM + start, sum[g], (size_t)(DIM - start < parts * LANES ? DIM - start : parts * LANES) * sizeof(float));
    }
}

static void turned(const float *x, const float *matrix, float *out)
{
    if (WIDTH == DIM) {
        sums(1, matrix, DIM, x, 0, out);
        return;
    }
    memset(out, 0, DIM * sizeof(float));
    for (int i = 0; i < DIM; i++)
        add(out, x[i], matrix + i * DIM);
}

/* Does EACH with every part of a packed vector: its bits are `width`, `shift` above the lowest, in `stretch` bytes from `offset`
 * on, of which each holds as many codes as fit (`sketchkv.quantize.pack`). */
#define EACH_PART(bits, EACH)                                                \
    for (int width = 8, shift = 0, offset = 0; width; width /= 2)            \
        if ((bits) & width) {                                                \
            const int stretch = DIM * width / 8;                             \
            EACH;                                                            \
            shift += width;                                                  \
            offset += stretch;                                               \
        }

#ifdef __AVX512F__ /* a table look-up of 16 numbers in one instruction, for which C has no words: three times as fast */
#include <immintrin.h>
/* The parts of a vector are as wide as a load, or half of it: not so for 192 or 320 channels. */
#define WIDE(bits) ((bits) <= 5 && DIM >= 64 && (DIM & (DIM - 1)) == 0)

/* What 16 channels from `start` on have in a part, as 16 numbers. */
INLINE __m512i part_of(const uint8_t *packed, int start, int stretch, int width)
{
    const __m512i second = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512i shift = _mm512_set1_epi32(start / stretch * width), mask = _mm512_set1_epi32((1 << width) - 1);
    __m128i bytes;
    if (stretch >= 16)
        memcpy(&bytes, packed + start % stretch, 16);
    else { /* 8 bytes twice: they hold the channels of both halves */
        int64_t word;
        memcpy(&word, packed, 8);
        bytes = _mm_set1_epi64x(word);
        shift = _mm512_add_epi32(shift, _mm512_mullo_epi32(second, _mm512_set1_epi32(width)));
    }
    return _mm512_and_epi32(_mm512_srlv_epi32(_mm512_cvtepu8_epi32(bytes), shift), mask);
}

INLINE void read_wide(const uint8_t *packed, int bits, const float *table, float *levels)
{
    const int size = 1 << bits;
    const __mmask16 few = (__mmask16)(size < 16 ? (1 << size) - 1 : 0xffff);
    const __m512 low = _mm512_maskz_loadu_ps(few, table), high = size > 16 ? _mm512_loadu_ps(table + 16) : low;
    for (int start = 0; start < DIM; start += 16) {
        __m512i code = _mm512_setzero_si512();
        EACH_PART(bits, code = _mm512_or_epi32(
                            code, _mm512_slli_epi32(part_of(packed + offset, start, stretch, width), (unsigned)shift)))
        _mm512_storeu_ps(levels + start, size > 16 ? _mm512_permutex2var_ps(low, code, high) : _mm512_permutexvar_ps(code, low));
    }
}
#else
#define WIDE(bits) 0
INLINE void read_wide(const uint8_t *packed, int bits, const float *table, float *levels)
{
    (void)packed, (void)bits, (void)table, (void)levels;
}
#endif

/* The levels of the codes at `at`; returns their scale. */
INLINE float read(const Coded *coded, int64_t at, int bits, float *levels)
{
    const uint8_t *packed = coded->codes + at * (DIM * bits / 8);
    const int block = DIM * (bits & -bits) / 8; /* the shortest stretch of channels that lie in order */
    if (WIDE(bits))
        read_wide(packed, bits, coded->levels, levels);
    for (int start = 0; start < DIM && !WIDE(bits); start += block) {
#pragma omp simd
        for (int j = 0; j < block; j++) {
            int code = 0;
            EACH_PART(bits, code |= (packed[offset + start % stretch + j] >> start / stretch * width & ((1 << width) - 1)) << shift)
            levels[start + j] = coded->levels[code];
        }
    }
    return from_half(coded->scales[at]);
}

INLINE void pack(const uint8_t *codes, int bits, uint8_t *packed)
{
    EACH_PART(bits, for (int j = 0; j < stretch; j++) {
        int byte = 0;
        for (int part = 0; part < 8 / width; part++)
            byte |= (codes[part * stretch + j] >> shift & ((1 << width) - 1)) << part * width;
        packed[offset + j] = (uint8_t)byte;
    })
}

/* Codes the vector x at `at`, as `Normal.encode` does; what is read from there then goes to `found`. */
static void encode(const Coded *coded, int64_t at, int bits, const float *x, float *found)
{
    uint8_t codes[DIM];
    int32_t code[DIM];
    float level[DIM], norm = sqrtf(dot(x, x)) / sqrtf(DIM);
    norm = norm < 0x1p-24f ? 0x1p-24f : norm;
    memset(code, 0, sizeof code);
    for (int i = 0; i < (1 << bits) - 1; i++) {
        float bound = coded->bounds[i];
#pragma omp simd
        for (int c = 0; c < DIM; c++)
            code[c] += !(x[c] / norm <= bound); /* NaN lies above all */
    }
    for (int c = 0; c < DIM; c++) {
        codes[c] = (uint8_t)code[c];
        level[c] = coded->levels[code[c]];
    }
    uint16_t scale = to_half(dot(x, level) / dot(level, level));
    coded->scales[at] = scale;
    pack(codes, bits, coded->codes + at * (DIM * bits / 8));
    for (int c = 0; c < DIM; c++)
        found[c] = level[c] * from_half(scale);
}
