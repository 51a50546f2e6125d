#include "platform.h"

#include "hash.h"

static int is_among(int32_t id, const int32_t *ids, size_t count)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (ids[middle] == id)
            return 1;
        if (ids[middle] < id)
            low = middle + 1;
        else
            high = middle;
    }
    return 0;
}

/* Fill the hash of each order: x_0 m_0 xor ... xor x_(n-1) m_(n-1), x_k being the id k tokens back. */
static void ngram_hashes(const engram_keyer *keyer, const int32_t *token_map, const int32_t *last,
                         uint64_t hashes[ENGRAM_MOST_ORDER])
{
    uint64_t mixed = 0;
    size_t back = 0;
    int hidden = 0;
    for (size_t order = 0; order < keyer->num_orders; order++) {
        for (; back < keyer->orders[order]; back++) {
            int32_t id = *(last - back);
            if (back > 0)
                hidden = hidden || id == ENGRAM_NO_TOKEN ||
                         is_among(id, keyer->barrier_ids, keyer->num_barrier_ids);
            if (hidden)
                id = keyer->pad_id;
            else if (token_map != NULL)
                id = token_map[id];
            mixed ^= (uint64_t)id * keyer->multipliers[back]; /* below 2^63: checked when it was packed */
        }
        hashes[order] = mixed;
    }
}

static void ngram_rows(const engram_keyer *keyer, const int32_t *token_map, const int32_t *last, int64_t *row_ids)
{
    uint64_t hashes[ENGRAM_MOST_ORDER];
    int silent = is_among(*last, keyer->silent_ids, keyer->num_silent_ids);
    ngram_hashes(keyer, token_map, last, hashes);
    for (size_t column = 0; column < keyer->num_orders * keyer->num_heads; column++) {
        uint64_t hash = hashes[column / keyer->num_heads];
        row_ids[column] = silent ? ENGRAM_NO_ROW : (int64_t)(hash % keyer->primes[column] + keyer->offsets[column]);
    }
}

void engram_row_ids(const engram_table *table, const int32_t *token_map, const int32_t *ids, size_t count,
                    int64_t *row_ids)
{
    const engram_keyer *keyer = &table->keyer;
    for (size_t token = 0; token < count; token++, row_ids += table->columns) {
        if (keyer->num_orders == 0)
            *row_ids = ids[token] < keyer->vocab_size ? ids[token] : keyer->pad_id;
        else
            ngram_rows(keyer, token_map, ids + token, row_ids);
    }
}
