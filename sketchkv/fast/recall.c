/* A decode step with an index, the rule of `sketchkv.recall`: the new token is stored, the index ranks all tokens, and what a
 * query asks for comes from the store into the slots that were attended to longest ago. `sketchkv/fast/recall.py` compiles it,
 * with more constants than cpu.c has: INDEX_BITS, CENTRE_BITS and PAGE, tokens of a page. */

#include "cpu.c"

enum { SIGNED = DIM * INDEX_BITS / 8, HALVES = 2 * SIGNED };
enum { KEY = DIM * KEY_BITS / 8, VALUE = DIM * VALUE_BITS / 8, RECORD = KEY + VALUE + 4 }; /* bytes */
enum { SOFTMAX, MAXIMUM, SUM };

typedef struct {
    Coded centre;             /* of the blocks */
    const uint8_t *signature; /* [rows, room, SIGNED] */
    const uint16_t *factor;   /* float16 [rows, room] */
    const float *levels;      /* of a signature */
    uint8_t *pages;           /* of the store, [pages, kv_heads, PAGE, RECORD] */
    const int64_t *table;     /* the pages of a sequence, [batch, width] */
    int32_t *asked;           /* [rows, capacity], as positions */
    uint8_t *unattended;
    float *taken;             /* tokens in the means of the tail (`sketchkv.tail`), [rows], or NULL: there is none */
    int64_t room, block, width, top, window, sinks, pooling;
} Index;

typedef struct { /* memory of one row's own */
    float *queries, *found, *tables, *estimates, *weight;
    int32_t *ranks, *list, *ages, *ties;
    uint8_t *asked;
} Scratch;

/* A number that n of `count` others are not below, or, where equal ones forbid it, the n-th highest of them. */
static int32_t nth_highest(const int32_t *numbers, int64_t count, int64_t n)
{
    int64_t low = INT32_MIN, high = INT32_MAX;
    while (low < high) { /* n numbers or more are not below `low` */
        int32_t middle = (int32_t)(high - (high - low) / 2), reach = 0;
#pragma omp simd reduction(+ : reach)
        for (int64_t i = 0; i < count; i++)
            reach += numbers[i] >= middle;
        if (reach == n)
            return middle;
        if (reach > n)
            low = middle;
        else
            high = (int64_t)middle - 1;
    }
    return (int32_t)low;
}

/* What each half of a signature's bytes adds to the product with a query: `tables` [HALVES, 16]. */
static void tabulate(const float *levels, const float *query, float *tables)
{
    const int parts = 4 / INDEX_BITS;
    for (int half = 0; half < HALVES; half++)
        for (int code = 0; code < 16; code++) {
            float sum = 0;
            for (int i = 0; i < parts; i++)
                sum += levels[code >> i * INDEX_BITS & ((1 << INDEX_BITS) - 1)] *
                       query[(half % 2 * parts + i) * SIGNED + half / 2];
            tables[half * 16 + code] = sum;
        }
}

/* Products of each query with 16 signatures, to `sums` [group, 16]. */
INLINE void look_up(const uint8_t *signature, int64_t group, const float *tables, float *sums)
{
#if defined __AVX512F__
    if (SIGNED % 4 == 0) { /* a word has eight halves, each an index into its table */
        __m512i words[SIGNED / 4 + 1], each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        each = _mm512_mullo_epi32(each, _mm512_set1_epi32(SIGNED));
        for (int word = 0; word < SIGNED / 4; word++)
            words[word] = _mm512_i32gather_epi32(each, signature + 4 * word, 1);
        for (int64_t g = 0; g < group; g++, tables += HALVES * 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int half = 0; half < HALVES; half++) {
                __m512i index = _mm512_srli_epi32(words[half / 8], (unsigned)(half % 8 * 4));
                sum = _mm512_add_ps(sum, _mm512_permutexvar_ps(index, _mm512_loadu_ps(tables + half * 16)));
            }
            _mm512_storeu_ps(sums + g * 16, sum);
        }
        return;
    }
#endif
    for (int64_t g = 0; g < group; g++, tables += HALVES * 16)
        for (int i = 0; i < 16; i++) {
            float sum = 0;
            for (int j = 0; j < SIGNED; j++) {
                int byte = signature[i * SIGNED + j];
                sum += tables[32 * j + (byte & 15)] + tables[32 * j + 16 + (byte >> 4)];
            }
            sums[g * 16 + i] = sum;
        }
}

/* Estimates of the logits of a row's full blocks from number `start` to before `end`, to `estimates` [group, coded]. */
static void estimate(const Index *index, int64_t row, int64_t start, int64_t end, int64_t coded, int64_t group,
                     const Scratch *own)
{
    float centre[DIM], sums[group * 16], base[group];
    for (int64_t g = 0; g < group; g++)
        tabulate(index->levels, own->queries + g * DIM, own->tables + g * HALVES * 16);
    for (int64_t block = start / index->block; block * index->block < end; block++) {
        float scale = read(&index->centre, row * (index->room / index->block) + block, CENTRE_BITS, centre);
        for (int64_t g = 0; g < group; g++)
            base[g] = dot(own->queries + g * DIM, centre) * scale;
        for (int64_t token = block * index->block; token < (block + 1) * index->block; token += 16) {
            const uint16_t *halves = index->factor + row * index->room + token;
            float factor[16];
#pragma omp simd
            for (int i = 0; i < 16; i++)
                factor[i] = from_half(halves[i]);
            look_up(index->signature + (row * index->room + token) * SIGNED, group, own->tables, sums);
            for (int64_t g = 0; g < group; g++)
#pragma omp simd
                for (int i = 0; i < 16; i++)
                    own->estimates[g * coded + token + i] = base[g] + factor[i] * sums[g * 16 + i];
        }
    }
}

/* What ranks tokens for all queries (`sketchkv.index.pool`), to the first row of estimates [group, coded]. resident:
 * log-sum-exp of the logits of what each query attends to anyway. */
static void pool(int64_t pooling, int64_t start, int64_t end, int64_t coded, int64_t group, const float *resident, float *estimates)
{
    for (int64_t g = 0; g < group; g++) {
        float *each = estimates + g * coded, top = resident[g], total = 0;
        if (pooling == SOFTMAX) {
#pragma omp simd reduction(max : top)
            for (int64_t i = start; i < end; i++)
                top = each[i] > top ? each[i] : top;
#pragma omp simd reduction(+ : total)
            for (int64_t i = start; i < end; i++) {
                each[i] = exponential(each[i] - top);
                total += each[i];
            }
            total += expf(resident[g] - top);
#pragma omp simd
            for (int64_t i = start; i < end; i++)
                each[i] /= total;
        }
        if (g && pooling == MAXIMUM)
            for (int64_t i = start; i < end; i++)
                estimates[i] = each[i] > estimates[i] ? each[i] : estimates[i];
        else if (g)
            for (int64_t i = start; i < end; i++)
                estimates[i] += each[i];
    }
}

/* Marks in `asked` [coded] the `top` of highest rank, of equal ones the newest; returns their number. */
static int64_t choose(const Index *index, int64_t start, int64_t end, const Scratch *own)
{
    int64_t count = end - start, left = count < index->top ? count : index->top;
    const int64_t chosen = left;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) { /* whole numbers in the order of the ranks (`sketchkv.ops.order`) */
        int32_t bits = (int32_t)to_bits(own->estimates[start + i] + 0.0f);
        own->ranks[i] = bits ^ (bits >> 31 & 0x7fffffff);
    }
    int32_t edge = nth_highest(own->ranks, count, left), above = 0;
#pragma omp simd reduction(+ : above)
    for (int64_t i = 0; i < count; i++) {
        own->asked[start + i] = own->ranks[i] > edge;
        above += own->ranks[i] > edge;
    }
    left -= above;
    for (int64_t i = count - 1; left; i--)
        if (own->ranks[i] == edge)
            own->asked[start + i] = 1, left--;
    return chosen;
}

/* Whether every query attends to the token at `position`: a sink, or one of the newest of `seen`. */
INLINE int always(const Index *index, int32_t position, int32_t first, int64_t seen)
{
    return position >= 0 && (position >= seen - index->window || position < first + index->sinks);
}

/* The n of `used` slots that may go, to `list`: empty ones first, then by when they were last attended to, then the older token's.
 * unattended: those that may. */
static void idle(const Index *index, const int32_t *positions, int64_t at, int64_t used, int64_t n, const Scratch *own)
{
    int64_t above = 0;
    for (int64_t i = 0; i < used; i++)
        own->ages[i] = !index->unattended[at + i] ? INT32_MIN : positions[i] < 0 ? INT32_MAX : -index->asked[at + i];
    const int32_t edge = nth_highest(own->ages, used, n);
    for (int64_t i = 0; i < used; i++) {
        own->ties[i] = own->ages[i] == edge ? -positions[i] : INT32_MIN;
        above += own->ages[i] > edge;
    }
    const int32_t newest = nth_highest(own->ties, used, n - above);
    for (int64_t i = 0, found = 0; i < used && found < n; i++)
        if (own->ages[i] > edge || (own->ages[i] == edge && own->ties[i] >= newest))
            own->list[found++] = (int32_t)i;
}

/* The record of a token in the store, from a slot or into one. */
static void copy(const Slots *slots, const Index *index, int64_t row, int64_t token, int64_t slot, int reads)
{
    int64_t batch = row / slots->kv_heads, head = row % slots->kv_heads, at = row * slots->capacity + slot;
    int64_t page = index->table[batch * index->width + token / PAGE];
    uint8_t *record = index->pages + ((page * slots->kv_heads + head) * PAGE + token % PAGE) * RECORD;
    void *parts[] = {slots->keys.codes + at * KEY, slots->keys.scales + at, slots->values.codes + at * VALUE, slots->values.scales + at};
    const size_t sizes[] = {KEY, 2, VALUE, 2};
    for (int part = 0; part < 4; record += sizes[part++])
        memcpy(reads ? parts[part] : record, reads ? record : parts[part], sizes[part]);
}

/* Log-sum-exp of the logits of the attended slots, of each query. The rests of the ring are left out. */
static void residents(const Slots *slots, const Index *index, int64_t row, int64_t used, int64_t group, const Scratch *own,
                      float *resident)
{
    const int64_t base = row * slots->capacity;
    float x[DIM], centre[DIM];
    int64_t count = 0;
    for (int c = 0; c < DIM; c++)
        centre[c] = from_half(slots->centre[row * DIM + c]);
    for (int64_t i = 0; i < used; i++) {
        if (index->unattended[base + i])
            continue;
        float scale = read(&slots->keys, base + i, KEY_BITS, x);
        for (int64_t g = 0; g < group; g++)
            own->weight[g * (slots->capacity + 1) + count] = dot(own->queries + g * DIM, x) * scale;
        count++;
    }
    for (int64_t g = 0; g < group; g++) {
        float *each = own->weight + g * (slots->capacity + 1), top = -FLT_MAX, total = 0;
        for (int64_t i = 0; i < count; i++)
            top = each[i] > top ? each[i] : top;
        for (int64_t i = 0; i < count; i++)
            total += exponential(each[i] - top);
        resident[g] = logf(total) + top + dot(own->queries + g * DIM, centre);
    }
}

/* Attention of a row's new token, number `seen - 1`, which its slot holds; returns how many tokens came from the store. */
static int64_t attend_chosen(const Slots *slots, const Index *index, int64_t row, int64_t seen, int64_t used, int64_t coded,
                             int64_t group, int32_t first, const Scratch *own, int64_t *chosen)
{
    const int64_t base = row * slots->capacity;
    int32_t *positions = slots->positions + base, *asked = index->asked + base;
    uint8_t *unattended = index->unattended + base;
    float resident[group];
    for (int64_t i = 0; i < used; i++)
        unattended[i] = !always(index, positions[i], first, seen);
    /* Tokens of the open block are in the window. A sequence that has not begun has first < 0. */
    int64_t start = (first < 0 ? 0 : first) + index->sinks, end = first < 0 ? 0 : seen - index->window, missing = 0;
    end = end < coded ? end : coded;
    if (start < end) {
        residents(slots, index, row, used, group, own, resident);
        estimate(index, row, start, end, coded, group, own);
        pool(index->pooling, start, end, coded, group, resident, own->estimates);
        missing = choose(index, start, end, own);
        *chosen += missing;
        for (int64_t i = 0; i < used; i++) {
            int32_t at = positions[i];
            if (at >= start && at < end && own->asked[at])
                own->asked[at] = unattended[i] = 0, missing--;
        }
    }
    if (missing)
        idle(index, positions, base, used, missing, own);
    for (int64_t token = start, found = 0; found < missing; token++)
        if (own->asked[token]) {
            int32_t slot = own->list[found++];
            copy(slots, index, row, token, slot, 1);
            positions[slot] = (int32_t)token;
            unattended[slot] = 0;
        }
    int64_t count = 0;
    for (int64_t i = 0; i < used; i++)
        if (!unattended[i]) {
            asked[i] = (int32_t)seen;
            own->list[count++] = (int32_t)i;
        }
    if (index->taken)
        slots->counts[row] = first >= 0 && index->taken[row] > 0 ? (float)(seen - first - count) : 0;
    attend_row(slots, row, own->list, count, group, own->queries, 0, &(Form){0}, span_of(slots, row), NULL, own->weight, own->found);
    return missing;
}

/* The new token of a row enters the means of the tail, unless it is a sink, padding or not finite. key, value: not turned. */
static void take(const Slots *slots, const Index *index, int64_t row, const float *key, const float *value, int32_t now, int32_t first)
{
    float new_key[DIM], new_value[DIM], *keys = slots->means + row * DIM, *values = slots->value_means + row * DIM;
    int sound = now >= 0 && now >= first + index->sinks;
    turned(key, slots->turn, new_key);
    turned(value, slots->turn, new_value);
    for (int c = 0; c < DIM; c++)
        sound &= isfinite(new_key[c]) && isfinite(new_value[c]);
    if (!sound)
        return;
    const float total = ++index->taken[row];
    for (int c = 0; c < DIM; c++) {
        keys[c] += (new_key[c] - keys[c]) / total;
        values[c] += (new_value[c] - values[c]) / total;
    }
}

/* One step of all rows: key, value, position and first as of `New`, query, scaling and out as of `attend`. seen: tokens with
 * the new one; used: slots occupied before it; coded: tokens of full blocks. counted: takes the tokens that were chosen, and those
 * that were missing. Returns whether memory sufficed; nothing has changed if not. */
int step(const Slots *slots, const Index *index, int64_t seen, int64_t used, int64_t coded, int64_t group, const float *query,
         int64_t q_batch, int64_t q_head, const float *key, int64_t k_batch, int64_t k_head, const float *value, int64_t v_batch,
         int64_t v_head, float scaling, const int32_t *position, int64_t p_batch, const int32_t *first, float *out, int64_t *counted)
{
    const int64_t capacity = slots->capacity, now_used = used < capacity ? used + 1 : used;
    const int64_t reals = group * (2 * DIM + HALVES * 16 + coded + stride_of(capacity)), wholes = coded + 3 * capacity;
    float *memory = malloc((size_t)(4 * (reals + wholes) + coded));
    if (!memory)
        return 0;
    Scratch own = {.queries = memory};
    own.found = own.queries + group * DIM;
    own.tables = own.found + group * DIM;
    own.estimates = own.tables + group * HALVES * 16;
    own.weight = own.estimates + group * coded;
    own.ranks = (int32_t *)(memory + reals);
    own.list = own.ranks + coded;
    own.ages = own.list + capacity;
    own.ties = own.ages + capacity;
    own.asked = (uint8_t *)(own.ties + capacity);
    counted[0] = counted[1] = 0;
    for (int64_t row = 0; row < slots->batch * slots->kv_heads; row++) {
        int64_t batch = row / slots->kv_heads, head = row % slots->kv_heads, base = row * capacity, slot = used;
        int32_t begins = first ? first[batch] : 0;
        if (used == capacity) {
            for (int64_t i = 0; i < used; i++)
                index->unattended[base + i] = !always(index, slots->positions[base + i], begins, seen - 1);
            idle(index, slots->positions + base, base, used, 1, &own);
            slot = own.list[0];
        }
        const float *new_key = key + batch * k_batch + head * k_head, *new_value = value + batch * v_batch + head * v_head;
        store(slots, row, slot, new_key, new_value, position[batch * p_batch], begins, span_of(slots, row));
        if (index->taken)
            take(slots, index, row, new_key, new_value, position[batch * p_batch], begins);
        index->asked[base + slot] = 0;
        copy(slots, index, row, seen - 1, slot, 0);
        turned_queries(slots, query + batch * q_batch + head * group * q_head, group, q_head, scaling, own.queries);
        counted[1] += attend_chosen(slots, index, row, seen, now_used, coded, group, begins, &own, counted);
        for (int64_t g = 0; g < group; g++)
            turned(own.found + g * DIM, slots->back, out + (row * group + g) * DIM);
    }
    free(memory);
    return 1;
}
