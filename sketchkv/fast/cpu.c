/* Decode steps over slots in `sketchkv.quantize.Normal` codes: a new token is turned, coded and stored, and attends to all
 * slots, of which nothing is decoded to memory; several do so one after the other, and the slots are read once for all.
 * `sketchkv/fast/cpu.py` compiles it, with these numbers as constants:
 * DIM channels of a vector; KEY_BITS, VALUE_BITS, REST_BITS of the codes.
 * The rule is that of `sketchkv.ops.Eager`; NaN and infinity spread as they do there, so no fast-math. */

#include <float.h>
#include <stdlib.h>

#include "normal.c"

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

/* First position and end of the tokens of a row that the ring covers, or NULL if there is none. */
INLINE int32_t *span_of(const Slots *slots, int64_t row)
{
    return slots->newest ? slots->span + 2 * (row / slots->kv_heads) : NULL;
}

/* The row of the ring where the token at `position` is (`sketchkv.ring.Ring.row`), or -1. */
INLINE int64_t ring_row(const Slots *slots, const int32_t *span, int32_t position)
{
    int32_t first = span[0], end = span[1];
    int sink = position < first + slots->sinks;
    if (position < 0 || position >= end || !(sink || position >= end - slots->newest))
        return -1;
    return sink ? position - first : slots->sinks + position % slots->newest;
}

/* Stores the token at position `now` in a slot of a row, and in the ring if there is a `span`. key, value: not turned; first:
 * position of the sequence's first real token. */
static void store(const Slots *slots, int64_t row, int64_t slot, const float *key, const float *value, int32_t now, int32_t first,
                  int32_t *span)
{
    int64_t at = row * slots->capacity + slot;
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
    if (!span)
        return;
    span[0] = first;
    span[1] = now + 1;
    int64_t rows = slots->newest + slots->sinks, own = ring_row(slots, span, now);
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
    int64_t several; /* whether they came with others, and enter the ring as `attend` comes to them */
} New;

static void enter(const Slots *slots, const New *new, int64_t row, int64_t token, int64_t slot, int32_t *span)
{
    int64_t batch = row / slots->kv_heads, head = row % slots->kv_heads;
    store(slots, row, slot, new->key + batch * new->k_batch + head * new->k_head + token * new->k_token,
          new->value + batch * new->v_batch + head * new->v_head + token * new->v_token,
          new->position[batch * new->p_batch + token], new->first ? new->first[batch] : 0, span);
}

/* Stores new tokens of all heads in the slots from `used` on. Of several the ring takes none: it holds what is near to the first
 * of them until `attend` comes. */
void append(const Slots *slots, const New *new, int64_t used)
{
#pragma omp parallel for if (new->count > 1)
    for (int64_t row = 0; row < slots->batch * slots->kv_heads; row++)
        for (int64_t token = 0; token < new->count; token++)
            enter(slots, new, row, token, used + token, new->several ? NULL : span_of(slots, row));
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

INLINE int64_t stride_of(int64_t used)
{
    return (used + BLOCK) / BLOCK * BLOCK; /* one more than `used` at least */
}

/* Products of `few` queries [few, DIM] with `keys` [DIM, room], to `out` [few, stride], in whole blocks. */
INLINE void products(int few, const float *keys, int64_t room, int64_t used, const float *query, float *out, int64_t stride)
{
    for (int64_t i = 0; i < used; i += BLOCK) {
        Wide low[TOGETHER] = {0}, high[TOGETHER] = {0};
        for (int c = 0; c < DIM; c++) {
            Wide first = *(const Wide *)(keys + c * room + i), second = *(const Wide *)(keys + c * room + i + LANES);
            for (int g = 0; g < few; g++) {
                low[g] += query[g * DIM + c] * first;
                high[g] += query[g * DIM + c] * second;
            }
        }
        for (int g = 0; g < few; g++) {
            *(Wide *)(out + g * stride + i) = low[g];
            *(Wide *)(out + g * stride + i + LANES) = high[g];
        }
    }
}

/* Calls a function for up to TOGETHER of `many`: of a fixed number, what it sums stays in registers. */
#define FEW(many, function, ...)                    \
    switch (many) {                                 \
    case 1: function(1, __VA_ARGS__); break;        \
    case 2: function(2, __VA_ARGS__); break;        \
    case 3: function(3, __VA_ARGS__); break;        \
    default: function(TOGETHER, __VA_ARGS__);       \
    }

/* Keys, without the centre, and values of a row's first slots, read once for several tokens: [DIM, room], so that a product is
 * one of many slots at once, and [slots, WIDTH]. */
typedef struct {
    float *keys, *values;
    int64_t room, among, *close; /* the `among` slots whose tokens may be in the ring */
} Decoded;

/* before: position of the last token that the ring has seen; first: of the sequence's first. */
static void decode(const Slots *slots, int64_t row, int64_t used, int32_t before, int32_t first, Decoded *decoded)
{
    float x[DIM];
    for (int64_t i = 0, at = row * slots->capacity; i < used; i++, at++) {
        if (slots->positions[at] > before - slots->newest || slots->positions[at] < first + slots->sinks)
            decoded->close[decoded->among++] = i;
        float scale = read(&slots->keys, at, KEY_BITS, x);
        for (int c = 0; c < DIM; c++)
            decoded->keys[c * decoded->room + i] = x[c] * scale;
        scale = read(&slots->values, at, VALUE_BITS, x);
        for (int c = 0; c < DIM; c++)
            decoded->values[i * WIDTH + c] = x[c] * scale;
    }
}

#define SLOT(i) (list ? list[i] : (i))

/* Attention of one KV head of a sequence to the slots of a list of `used`, NULL for the first: `group` queries, turned and
 * scaled, to `out`, turned, both [group, DIM]; `weight` [group, stride_of(used)] takes the attention, of the summary after the slots. span: of
 * the ring, or NULL; decoded: what `decode` made of the slots, or NULL. */
INLINE void head_attend(const Slots *slots, int64_t row, const int32_t *list, int64_t used, int group, const float *query,
                        int padded, const Form *form, const int32_t *span, const Decoded *decoded, float *weight, float *out)
{
    const int64_t base = row * slots->capacity, stride = stride_of(used), rows = slots->newest + slots->sinks;
    const int64_t among = decoded ? decoded->among : used;
    const float softcap = form->softcap, *sinks = form->sinks ? form->sinks + row % slots->kv_heads * group : NULL;
    float centre[DIM], x[DIM];
    for (int64_t i = 0; !decoded && i < used; i++) {
        float scale = read(&slots->keys, base + SLOT(i), KEY_BITS, x);
        for (int g = 0; g < group; g++)
            weight[g * stride + i] = dot(query + g * DIM, x) * scale;
    }
    for (int g = 0; decoded && g < group; g += TOGETHER)
        FEW(group - g, products, decoded->keys, decoded->room, used, query + g * DIM, weight + g * stride, stride)
    for (int64_t j = 0; span && j < among; j++) {
        int64_t i = decoded ? decoded->close[j] : j, near = ring_row(slots, span, slots->positions[base + SLOT(i)]);
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
    for (int64_t i = 0; !decoded && i < used; i++) {
        float scale = read(&slots->values, base + SLOT(i), VALUE_BITS, x);
        for (int g = 0; g < group; g++)
            add(out + g * DIM, weight[g * stride + i] * scale, x);
    }
    for (int g = 0; decoded && g < group; g += TOGETHER)
        FEW(group - g, sums, decoded->values, used, weight + g * stride, stride, out + g * DIM)
    for (int64_t j = 0; span && j < among; j++) {
        int64_t i = decoded ? decoded->close[j] : j, near = ring_row(slots, span, slots->positions[base + SLOT(i)]);
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
                       int padded, const Form *form, const int32_t *span, const Decoded *decoded, float *weight, float *out)
{
    switch (group) { /* The compiler makes each of these by itself. */
    case 1: head_attend(slots, row, list, used, 1, query, padded, form, span, decoded, weight, out); break;
    case 2: head_attend(slots, row, list, used, 2, query, padded, form, span, decoded, weight, out); break;
    case 3: head_attend(slots, row, list, used, 3, query, padded, form, span, decoded, weight, out); break;
    case 4: head_attend(slots, row, list, used, 4, query, padded, form, span, decoded, weight, out); break;
    default: head_attend(slots, row, list, used, (int)group, query, padded, form, span, decoded, weight, out);
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

/* `attend` for one KV head of a sequence. */
static int row_attend(const Slots *slots, const New *new, const Form *form, int64_t row, int64_t used, int64_t group, int padded,
                      float decay, float *received, float *out)
{
    int64_t batch = row / slots->kv_heads, head = row % slots->kv_heads, count = new->count, room = stride_of(used);
    int several = (int)new->several;
    size_t needed = (size_t)(group * (room + 2 * DIM) + several * (DIM * room + used * (WIDTH + 2)));
    float *scratch = calloc(needed, sizeof(float));
    if (!scratch)
        return 0;
    float *own = scratch, *found = own + group * DIM, *weight = found + group * DIM;
    Decoded decoded = {weight + group * room, weight + group * room + DIM * room, room, 0, NULL};
    const float *query = new->query + batch * new->q_batch + head * group * new->q_head;
    float *mass = slots->mass + row * slots->capacity;
    int32_t passing[2], *span = several && slots->newest ? passing : span_of(slots, row);
    if (several) {
        decoded.close = (int64_t *)(decoded.values + used * WIDTH);
        decode(slots, row, used, new->position[batch * new->p_batch] - 1, new->first ? new->first[batch] : 0, &decoded);
    }
    for (int64_t token = 0; token < count; token++) {
        int64_t now_used = used - count + token + 1;
        if (several)
            enter(slots, new, row, token, now_used - 1, span);
        turned_queries(slots, query + token * new->q_token, group, new->q_head, form->scaling, own);
        attend_row(slots, row, NULL, now_used, group, own, padded, form, span, several ? &decoded : NULL, weight, found);
        for (int g = 0; g < group; g++)
            turned(found + g * DIM, slots->back, out + ((row * group + g) * count + token) * DIM);
        float real = !padded || new->position[batch * new->p_batch + token] >= 0;
        for (int g = 1; g < group; g++)
            for (int64_t i = 0; i < now_used; i++)
                weight[i] += weight[g * stride_of(now_used) + i];
        for (int64_t i = 0; received && i < used; i++)
            received[(row * count + token) * used + i] = i < now_used ? real * weight[i] : 0;
        for (int64_t i = 0; decay >= 0 && i < now_used; i++)
            mass[i] = decay * mass[i] + real * weight[i];
    }
    free(scratch);
    return 1;
}

/* Attention of the new tokens, in the last of `used` slots, of `group` query heads for each KV head; several enter the ring as
 * their turn comes. out: [batch, heads, tokens, DIM]. received: what slots receive, all heads of a group, [rows, tokens, used], or
 * NULL; with decay >= 0 it is added to the mass instead. padded: whether some rows are. Returns whether memory sufficed. */
int attend(const Slots *slots, const New *new, const Form *form, int64_t used, int64_t group, int padded, float decay,
           float *received, float *out)
{
    int sufficed = 1;
#pragma omp parallel for reduction(&& : sufficed) schedule(dynamic)
    for (int64_t row = 0; row < slots->batch * slots->kv_heads; row++)
        sufficed = row_attend(slots, new, form, row, used, group, padded, decay, received, out) && sufficed;
    for (int64_t batch = 0; new->several && slots->newest && batch < slots->batch; batch++) {
        slots->span[2 * batch] = new->first ? new->first[batch] : 0;
        slots->span[2 * batch + 1] = new->position[batch * new->p_batch + new->count - 1] + 1;
    }
    return sufficed;
}

#include "leave.c"
