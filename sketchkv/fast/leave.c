/* An eviction, the rule of `sketchkv.ops.Eager.evict`: the lowest scores go, padding first, sinks and the recent window never, and
 * of equal scores the older ones. Those that go are folded into the summary, and survivors of the last slots take their places.
 * cpu.c includes it. */

/* What lies in the slots, [rows, capacity] of `size` bytes each. */
typedef struct {
    uint8_t *data;
    int64_t size, empty; /* the byte that free slots are filled with, or -1: they stay as they are */
} Array;

/* Numbers in the order of (score, position); NaN is the highest. */
INLINE int64_t rank_of(float score, int32_t position)
{
    int32_t bits = (int32_t)to_bits(score + 0.0f); /* a negative zero equals zero */
    bits ^= bits >> 31 & 0x7fffffff;               /* negative floats fall as their bits rise */
    return (int64_t)bits * (1LL << 32) + position;
}

/* Moves the `count` lowest ranks to the front, the highest of them last. */
static void select_lowest(int64_t *ranks, int64_t many, int64_t count)
{
    for (int64_t low = 0, high = many - 1; low < high;) {
        int64_t pivot = ranks[low + (high - low) / 2], i = low, j = high;
        while (i <= j) {
            while (ranks[i] < pivot)
                i++;
            while (ranks[j] > pivot)
                j--;
            if (i <= j) {
                int64_t other = ranks[i];
                ranks[i++] = ranks[j];
                ranks[j--] = other;
            }
        }
        if (count - 1 <= j)
            high = j;
        else if (count - 1 >= i)
            low = i;
        else
            return;
    }
}

/* Folds the slots `gone` of a row into its summary slot (`sketchkv.summary.Summary.fold`). */
static void fold(const Slots *slots, int64_t row, const int64_t *gone, int64_t count)
{
    float keys[DIM] = {0}, values[DIM] = {0}, key[DIM], value[DIM], added = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t at = row * slots->capacity + gone[i];
        float key_scale = read(&slots->keys, at, KEY_BITS, key), value_scale = read(&slots->values, at, VALUE_BITS, value);
        int sound = slots->positions[at] >= 0;
        for (int c = 0; c < DIM; c++) {
            key[c] = key[c] * key_scale + from_half(slots->centre[row * DIM + c]);
            value[c] *= value_scale;
            sound &= isfinite(key[c]) && isfinite(value[c]);
        }
        if (!sound)
            continue;
        added++;
        add(keys, 1, key);
        add(values, 1, value);
    }
    float total = slots->counts[row] += added, *mean = slots->means + row * DIM, *other = slots->value_means + row * DIM;
    for (int c = 0; c < DIM; c++) {
        mean[c] += (keys[c] - added * mean[c]) / (total < 1 ? 1 : total);
        other[c] += (values[c] - added * other[c]) / (total < 1 ? 1 : total);
    }
}

/* Frees `count` of the first `used` slots of each row. importance: [rows, used]. first: position of each sequence's first real
 * token, or NULL for 0; sinks: tokens from there on that stay; recent: position from which on all stay. Returns 0, or without
 * having changed anything: 1 if an importance is NaN, 2 if there is no memory. */
int evict(const Slots *slots, const float *importance, int64_t used, int64_t count, const int32_t *first, int64_t sinks, int64_t recent,
          const Array *arrays, int64_t many)
{
    int64_t rows = slots->batch * slots->kv_heads, kept = used - count, *ranks = malloc((size_t)(rows + 2) * (size_t)used * sizeof(int64_t));
    int nan = 0;
    if (!ranks)
        return 2;
    int64_t *sorted = ranks + rows * used, *gone = sorted + used;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < used; i++) {
            int32_t position = slots->positions[row * slots->capacity + i];
            float score = importance[row * used + i];
            score = score < -1e30f ? -1e30f : score > 1e30f ? 1e30f : score;
            if (position < (first ? first[row / slots->kv_heads] : 0) + sinks || position >= recent)
                score = INFINITY;
            if (position < 0)
                score = -INFINITY;
            nan |= isnan(score);
            ranks[row * used + i] = rank_of(score, position);
        }
    for (int64_t row = 0; !nan && row < rows; row++) {
        const int64_t *own = ranks + row * used;
        memcpy(sorted, own, (size_t)used * sizeof(int64_t));
        select_lowest(sorted, used, count);
        int64_t most = sorted[count - 1], ties = 0, found = 0, hole = 0;
        for (int64_t i = 0; i < count; i++)
            ties += sorted[i] == most; /* of padding alone are there several of one rank */
        for (int64_t i = 0; i < used && found < count; i++)
            if (own[i] < most || (own[i] == most && ties-- > 0))
                gone[found++] = i;
        if (slots->counts)
            fold(slots, row, gone, count);
        int64_t lost = 0; /* of the last `count` slots; the first holes lie below them */
        while (lost < count && gone[lost] < kept)
            lost++;
        for (int64_t slot = kept; slot < used; slot++) {
            if (lost < count && gone[lost] == slot) {
                lost++;
                continue;
            }
            for (int64_t a = 0; a < many; a++) {
                uint8_t *base = arrays[a].data + row * slots->capacity * arrays[a].size;
                memcpy(base + gone[hole] * arrays[a].size, base + slot * arrays[a].size, (size_t)arrays[a].size);
            }
            hole++;
        }
        for (int64_t a = 0; a < many; a++)
            if (arrays[a].empty >= 0)
                memset(arrays[a].data + (row * slots->capacity + kept) * arrays[a].size, (int)arrays[a].empty, (size_t)(count * arrays[a].size));
    }
    free(ranks);
    return nan;
}
