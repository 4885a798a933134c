/* Decode steps over slots in `sketchkv.quantize.Normal` codes: a new token is turned, coded and stored, and attends to all
 * slots, of which nothing is decoded to memory; several tokens do so one after the other. `sketchkv/fast/cpu.py` compiles it, with these numbers as constants:
 * DIM channels of a vector; KEY_BITS, VALUE_BITS, REST_BITS of the codes.
 * The rule is that of `sketchkv.ops.Eager`; NaN and infinity spread as they do there, so no fast-math. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    uint8_t *codes;   /* [rows, slots, DIM * bits / 8] */
    uint16_t *scales; /* float16 [rows, slots] */
    const float *levels, *bounds;
} Coded;

typedef struct {
    Coded keys, values, rest_keys, rest_values; /* the rests of a ring, if newest > 0 */
    int32_t *positions;                         /* [rows, capacity]; a row is a KV head of a sequence */
    const uint16_t *centre;                     /* float16 [rows, DIM] */
    const float *turn, *back;                   /* [DIM, DIM]: the rotation, and its transpose */
    int32_t *span;                              /* [batch, 2], of the ring */
    float *means, *value_means, *counts;        /* of the summary slot, or NULL */
    float *mass;                                /* [rows, capacity], or NULL */
    int64_t batch, kv_heads, capacity, newest, sinks;
} Slots;

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

static void turned(const float *x, const float *matrix, float *out)
{
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

/* The row of the ring where the token at `position` is (`sketchkv.ring.Ring.row`), or -1. */
INLINE int64_t ring_row(const Slots *slots, int64_t batch, int32_t position)
{
    int32_t first = slots->span[2 * batch], end = slots->span[2 * batch + 1];
    int sink = position < first + slots->sinks;
    if (position < 0 || position >= end || !(sink || position >= end - slots->newest))
        return -1;
    return sink ? position - first : slots->sinks + position % slots->newest;
}

/* Stores the token at position `now` in a slot of a row, and in the ring if it is `near`. key, value: not turned; first:
 * position of the sequence's first real token. */
static void store(const Slots *slots, int64_t row, int64_t slot, const float *key, const float *value, int32_t now, int32_t first,
                  int near)
{
    int64_t batch = row / slots->kv_heads, at = row * slots->capacity + slot;
    float new_key[DIM], new_value[DIM], centre[DIM], distance[DIM], found[DIM];
    turned(key, slots->turn, new_key);
    turned(value, slots->turn, new_value);
    for (int c = 0; c < DIM; c++) {
        centre[c] = from_half(slots->centre[row * DIM + c]);
        distance[c] = new_key[c] - centre[c];
    }
    encode(&slots->keys, at, KEY_BITS, distance, found);
    for (int c = 0; c < DIM; c++)
        new_key[c] -= found[c] + centre[c];
    encode(&slots->values, at, VALUE_BITS, new_value, found);
    for (int c = 0; c < DIM; c++)
        new_value[c] -= found[c];
    slots->positions[at] = now;
    if (!slots->newest || !near)
        return;
    slots->span[2 * batch] = first;
    slots->span[2 * batch + 1] = now + 1;
    int64_t rows = slots->newest + slots->sinks, own = ring_row(slots, batch, now);
    own = row * rows + (own < 0 ? rows - 1 : own); /* padding comes before all that is held */
    encode(&slots->rest_keys, own, REST_BITS, new_key, found);
    encode(&slots->rest_values, own, REST_BITS, new_value, found);
}

/* New tokens, and their queries: strides of a sequence, a head and a token, in numbers. position: of each sequence's tokens,
 * `p_batch` apart; first: of its first real token, or NULL for 0. */
typedef struct {
    const float *key, *value, *query;
    const int32_t *position, *first;
    int64_t k_batch, k_head, k_token, v_batch, v_head, v_token, q_batch, q_head, q_token, p_batch, count;
} New;

static void enter(const Slots *slots, const New *new, int64_t row, int64_t token, int64_t slot, int near)
{
    int64_t batch = row / slots->kv_heads, head = row % slots->kv_heads;
    store(slots, row, slot, new->key + batch * new->k_batch + head * new->k_head + token * new->k_token,
          new->value + batch * new->v_batch + head * new->v_head + token * new->v_token,
          new->position[batch * new->p_batch + token], new->first ? new->first[batch] : 0, near);
}

/* Stores new tokens of all heads in the slots from `used` on. Of several the ring takes none: it holds what is near to the first
 * of them until `attend` comes. */
void append(const Slots *slots, const New *new, int64_t used)
{
    for (int64_t row = 0; row < slots->batch * slots->kv_heads; row++)
        for (int64_t token = 0; token < new->count; token++)
            enter(slots, new, row, token, used + token, new->count == 1);
}

/* Norms of the values in the first `used` slots, [rows, used]. */
void norms(const Slots *slots, int64_t used, float *out)
{
    float x[DIM];
    for (int64_t row = 0; row < slots->batch * slots->kv_heads; row++)
        for (int64_t i = 0; i < used; i++) {
            float scale = read(&slots->values, row * slots->capacity + i, VALUE_BITS, x);
            out[row * used + i] = sqrtf(dot(x, x)) * fabsf(scale);
        }
}

/* How logits are formed (`sketchkv.logits.Form`): softcap 0 for none; sinks: of all query heads, or NULL. */
typedef struct {
    float scaling, softcap;
    const float *sinks;
} Form;

INLINE float capped(float logit, float softcap)
{
    return softcap > 0 ? softcap * tanhf(logit / softcap) : logit;
}

#define SLOT(i) (list ? list[i] : (i))

/* Attention of one KV head of a sequence to the slots of a list of `used`, NULL for the first: `group` queries, turned and
 * scaled, to `out`, turned, both [group, DIM]; `weight` [group, used + 1] takes the attention, of the summary last. */
INLINE void head_attend(const Slots *slots, int64_t row, const int32_t *list, int64_t used, int group, const float *query,
                        int padded, const Form *form, float *weight, float *out)
{
    const int64_t base = row * slots->capacity, stride = used + 1, rows = slots->newest + slots->sinks;
    const float softcap = form->softcap, *sinks = form->sinks ? form->sinks + row % slots->kv_heads * group : NULL;
    float centre[DIM], x[DIM];
    for (int64_t i = 0; i < used; i++) {
        float scale = read(&slots->keys, base + SLOT(i), KEY_BITS, x);
        for (int g = 0; g < group; g++)
            weight[g * stride + i] = dot(query + g * DIM, x) * scale;
    }
    for (int64_t i = 0; slots->newest && i < used; i++) {
        int64_t near = ring_row(slots, row / slots->kv_heads, slots->positions[base + SLOT(i)]);
        if (near < 0)
            continue;
        float scale = read(&slots->rest_keys, row * rows + near, REST_BITS, x);
        for (int g = 0; g < group; g++)
            weight[g * stride + i] += dot(query + g * DIM, x) * scale;
    }
    for (int c = 0; c < DIM; c++)
        centre[c] = from_half(slots->centre[row * DIM + c]);
    for (int g = 0; g < group; g++) {
        float *own = weight + g * stride, top = -INFINITY, total = 0, shift = dot(query + g * DIM, centre);
        for (int64_t i = 0; i < used; i++)
            own[i] = padded && slots->positions[base + SLOT(i)] < 0 ? -FLT_MAX : capped(own[i] + shift, softcap);
        own[used] = -INFINITY;
        if (slots->counts)
            own[used] = capped(dot(query + g * DIM, slots->means + row * DIM), softcap) + logf(slots->counts[row]);
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i <= used; i++)
            top = own[i] > top ? own[i] : top;
        if (sinks) { /* a logit that takes attention and gives nothing */
            top = sinks[g] > top ? sinks[g] : top;
            total = exponential(sinks[g] - top);
        }
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i <= used; i++) {
            own[i] = exponential(own[i] - top);
            total += own[i];
        }
        for (int64_t i = 0; i <= used; i++)
            own[i] /= total;
    }
    memset(out, 0, (size_t)group * DIM * sizeof(float));
    for (int64_t i = 0; i < used; i++) {
        float scale = read(&slots->values, base + SLOT(i), VALUE_BITS, x);
        for (int g = 0; g < group; g++)
            add(out + g * DIM, weight[g * stride + i] * scale, x);
    }
    for (int64_t i = 0; slots->newest && i < used; i++) {
        int64_t near = ring_row(slots, row / slots->kv_heads, slots->positions[base + SLOT(i)]);
        if (near < 0)
            continue;
        float scale = read(&slots->rest_values, row * rows + near, REST_BITS, x);
        for (int g = 0; g < group; g++)
            add(out + g * DIM, weight[g * stride + i] * scale, x);
    }
    for (int g = 0; slots->counts && slots->counts[row] > 0 && g < group; g++)
        add(out + g * DIM, weight[g * stride + used], slots->value_means + row * DIM);
}

static void attend_row(const Slots *slots, int64_t row, const int32_t *list, int64_t used, int64_t group, const float *query,
                       int padded, const Form *form, float *weight, float *out)
{
    switch (group) { /* The compiler makes each of these by itself. */
    case 1: head_attend(slots, row, list, used, 1, query, padded, form, weight, out); break;
    case 2: head_attend(slots, row, list, used, 2, query, padded, form, weight, out); break;
    case 3: head_attend(slots, row, list, used, 3, query, padded, form, weight, out); break;
    case 4: head_attend(slots, row, list, used, 4, query, padded, form, weight, out); break;
    default: head_attend(slots, row, list, used, (int)group, query, padded, form, weight, out);
    }
}

/* The query heads of a row, turned and scaled, to `own` [group, DIM]. */
static void turned_queries(const Slots *slots, const float *query, int64_t group, int64_t q_head, float scaling, float *own)
{
    for (int64_t g = 0; g < group; g++) {
        turned(query + g * q_head, slots->turn, own + g * DIM);
        for (int c = 0; c < DIM; c++)
            own[g * DIM + c] *= scaling;
    }
}

/* Attention of the new tokens, in the last of `used` slots, of `group` query heads for each KV head; several enter the ring as
 * their turn comes. out: [batch, heads, tokens, DIM]. received: what slots receive, all heads of a group, [rows, tokens, used], or
 * NULL; with decay >= 0 it is added to the mass instead. padded: whether some rows are. Returns whether memory sufficed. */
int attend(const Slots *slots, const New *new, const Form *form, int64_t used, int64_t group, int padded, float decay,
           float *received, float *out)
{
    float *scratch = malloc((size_t)group * (size_t)(used + 1 + 2 * DIM) * sizeof(float));
    if (!scratch)
        return 0;
    float *own = scratch, *found = own + group * DIM, *weight = found + group * DIM;
    for (int64_t row = 0; row < slots->batch * slots->kv_heads; row++) {
        int64_t batch = row / slots->kv_heads, head = row % slots->kv_heads, count = new->count;
        const float *query = new->query + batch * new->q_batch + head * group * new->q_head;
        float *mass = slots->mass + row * slots->capacity;
        for (int64_t token = 0; token < count; token++) {
            int64_t now_used = used - count + token + 1;
            if (count > 1)
                enter(slots, new, row, token, now_used - 1, 1);
            turned_queries(slots, query + token * new->q_token, group, new->q_head, form->scaling, own);
            attend_row(slots, row, NULL, now_used, group, own, padded, form, weight, found);
            for (int g = 0; g < group; g++)
                turned(found + g * DIM, slots->back, out + ((row * group + g) * count + token) * DIM);
            float real = !padded || new->position[batch * new->p_batch + token] >= 0;
            for (int64_t i = 0; (decay >= 0 || received) && i < used; i++) {
                float sum = 0;
                for (int g = 0; i < now_used && g < group; g++)
                    sum += weight[g * (now_used + 1) + i];
                if (received)
                    received[(row * count + token) * used + i] = real * sum;
                else if (i < now_used)
                    mass[i] = decay * mass[i] + real * sum;
            }
        }
    }
    free(scratch);
    return 1;
}
