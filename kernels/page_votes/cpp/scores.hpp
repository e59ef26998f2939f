// Scores of pages: products of rows of queries with entries, wherever these lie, and what is added to them.
#pragma once

#include <algorithm>

#include "vectors.hpp"

namespace {

constexpr std::size_t FEW = 3;              // rows whose products with FEW_KEYS entries stay in registers
constexpr std::size_t FEW_KEYS = 4;
constexpr std::size_t AHEAD = 32;           // entries
#if defined(__AVX512F__)
constexpr std::size_t MANY = 11;            // rows whose products with MANY_KEYS entries do: with AVX-512 there are 32 registers
#else
constexpr std::size_t MANY = 6;
#endif
constexpr std::size_t MANY_KEYS = 2 * LANES;

// Queries of one group and KV head, [rows, width].
struct Queries {
    const float *numbers;
    std::size_t rows, width;
};

// Where scores go, rows of them `stride` apart, and what is added: the sizes of pages, if any, and to all of a row `added`.
struct Scores {
    float *scores;
    std::size_t stride;
    const float *sizes, *added;

    void put(std::size_t row, std::size_t page, float product) const {
        scores[row * stride + page] = product + (sizes ? sizes[page] : 0) + added[row];
    }

    void put(std::size_t row, std::size_t page, const Vector &products, std::size_t count) const {
        float *to = scores + row * stride + page;
        if (count >= LANES) {
            store(to, products + (sizes ? load(sizes + page) : Vector{}) + added[row]);
        } else {
            const Vector some = products + (sizes ? load_some(sizes + page, count) : Vector{}) + added[row];
            std::memcpy(to, &some, count * sizeof *to);
        }
    }
};

// Entries that will be wanted are brought near beforehand: they lie here and there, and a processor foresees only what is in a
// row. A line of the cache at a time.
constexpr std::size_t LINE = 64;

template <class Number>
inline std::size_t lines(const Number *, std::size_t width) {
    return (width * sizeof(Number) + LINE - 1) / LINE;
}

inline std::size_t lines(Nibbles entry, std::size_t width) {
    return lines(entry.bytes, (width + 1) / 2);
}

template <class Number>
inline void fetch(const Number *entry, std::size_t line) {
    __builtin_prefetch(reinterpret_cast<const char *>(entry) + line * LINE);
}

inline void fetch(Nibbles entry, std::size_t line) {
    fetch(entry.bytes, line);
}

// Brings some entries near, each time it is called a line of them: all at once they would have to wait for each other.
template <class At>
class Ahead {
public:
    Ahead(const At &at, std::size_t begin, std::size_t end, std::size_t width)
        : at_(at), key_(begin), end_(end), lines_(begin < end ? lines(at(begin), width) : 0) {}

    void operator()() {
        if (key_ >= end_)
            return;
        fetch(at_(key_), line_);
        if (++line_ == lines_) {
            line_ = 0;
            ++key_;
        }
    }

private:
    const At &at_;
    std::size_t key_, end_, lines_, line_ = 0;
};

// Each entry as it lies: numbers side by side are multiplied together, and their products added up in the end.
template <std::size_t ROWS, class Entry>
inline void multiply(const float *queries, std::size_t width, const Entry (&entries)[FEW_KEYS],
                     float (&products)[ROWS][FEW_KEYS]) {
    Vector found[ROWS][FEW_KEYS] = {};
    const auto add = [&](const auto &part) {
        Vector query[ROWS];
        for (std::size_t row = 0; row < ROWS; ++row)
            query[row] = part(queries + row * width);
        for (std::size_t key = 0; key < FEW_KEYS; ++key) {
            const Vector entry = part(entries[key]);
            for (std::size_t row = 0; row < ROWS; ++row)
                found[row][key] += query[row] * entry;
        }
    };
    std::size_t at = 0;
    for (; at + LANES <= width; at += LANES)
        add([at](const auto &numbers) { return load(numbers + at); });
    if (at < width)
        add([at, width](const auto &numbers) { return load_some(numbers + at, width - at); });
    for (std::size_t row = 0; row < ROWS; ++row)
        sums(found[row], products[row]);
}

template <std::size_t ROWS, class At>
void score_few(const Queries &queries, std::size_t count, const At &at, const Scores &to) {
    using Entry = decltype(at(0));
    for (std::size_t begin = 0; begin < count; begin += FEW_KEYS) {
        Entry entries[FEW_KEYS];
        for (std::size_t key = begin + AHEAD; key < std::min(begin + AHEAD + FEW_KEYS, count); ++key)
            for (std::size_t line = 0; line < lines(at(key), queries.width); ++line)
                fetch(at(key), line);
        for (std::size_t key = 0; key < FEW_KEYS; ++key)
            entries[key] = at(std::min(begin + key, count - 1));
        float products[ROWS][FEW_KEYS];
        multiply<ROWS>(queries.numbers, queries.width, entries, products);
        for (std::size_t row = 0; row < ROWS; ++row)
            for (std::size_t key = 0; key < std::min(FEW_KEYS, count - begin); ++key)
                to.put(row, begin + key, products[row][key]);
    }
}

// MANY_KEYS entries from page `begin` on, in fp32 and turned: [width, MANY_KEYS]; of fewer, the last one again and again.
template <class At>
inline void turn(std::size_t begin, std::size_t count, const At &at, std::size_t width, float *turned) {
    using Entry = decltype(at(0));
    for (std::size_t key = 0; key < MANY_KEYS; key += LANES) {
        Entry entries[LANES];
        for (std::size_t lane = 0; lane < LANES; ++lane)
            entries[lane] = at(std::min(begin + key + lane, count - 1));
        for (std::size_t from = 0; from < width; from += LANES) {
            const std::size_t some = std::min(LANES, width - from);
            Vector square[LANES];
            for (std::size_t lane = 0; lane < LANES; ++lane)
                square[lane] = some == LANES ? load(entries[lane] + from) : load_some(entries[lane] + from, some);
            transpose(square);
            for (std::size_t number = 0; number < some; ++number)
                store(turned + (from + number) * MANY_KEYS + key, square[number]);
        }
    }
}

// Products of rows with entries that `turn` made: one number of each entry at a time, and meanwhile what comes next.
template <std::size_t ROWS, class Next>
inline void multiply_turned(const float *queries, std::size_t width, const float *turned, Vector (&found)[ROWS][2],
                            Next &next) {
    Vector sums[ROWS][2] = {};      // of its own, and so in registers
    for (std::size_t at = 0; at < width; ++at) {
        const Vector low = load(turned + at * MANY_KEYS), high = load(turned + at * MANY_KEYS + LANES);
        next();
        for (std::size_t row = 0; row < ROWS; ++row) {
            const float query = queries[row * width + at];
            sums[row][0] += query * low;
            sums[row][1] += query * high;
        }
    }
    for (std::size_t row = 0; row < ROWS; ++row)
        for (std::size_t half = 0; half < 2; ++half)
            found[row][half] = sums[row][half];
}

template <class At>
void score_many(const Queries &queries, std::size_t count, const At &at, float *turned, const Scores &to) {
    const auto score_rows = [&]<std::size_t ROWS>(std::size_t row, std::size_t begin, Ahead<At> &next) {
        Vector found[ROWS][2];
        multiply_turned<ROWS>(queries.numbers + row * queries.width, queries.width, turned, found, next);
        for (std::size_t below = 0; below < ROWS; ++below)
            for (std::size_t half = 0; half < 2 && begin + half * LANES < count; ++half)
                to.put(row + below, begin + half * LANES, found[below][half], count - begin - half * LANES);
    };
    // Evenly, FEW to MANY rows at a time: one or two that are left over would wait for their sums.
    const std::size_t parts = (queries.rows + MANY - 1) / MANY;
    for (std::size_t begin = 0; begin < count; begin += MANY_KEYS) {
        turn(begin, count, at, queries.width, turned);
        Ahead next(at, begin + MANY_KEYS, std::min(begin + 2 * MANY_KEYS, count), queries.width);
        for (std::size_t part = 0; part < parts; ++part) {
            const std::size_t row = queries.rows * part / parts;
            const std::size_t together = queries.rows * (part + 1) / parts - row;
            [&]<std::size_t... MORE>(std::index_sequence<MORE...>) {
                (void)((together == FEW + MORE && (score_rows.template operator()<FEW + MORE>(row, begin, next), true)) || ...);
            }(std::make_index_sequence<MANY - FEW + 1>{});
        }
    }
}

// Scores of pages whose entries are at(0), at(1), ...; room: [width, MANY_KEYS].
template <class At>
void score(const Queries &queries, std::size_t count, const At &at, float *room, const Scores &to) {
    switch (queries.rows) {
    case 1: return score_few<1>(queries, count, at, to);
    case 2: return score_few<2>(queries, count, at, to);
    case 3: return score_few<FEW>(queries, count, at, to);
    default: score_many(queries, count, at, room, to);
    }
}

}  // namespace
