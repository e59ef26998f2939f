// Votes on pages on a CPU, one KV head after the other: scores, leaves that are opened, softmax. naive.py says what they are.
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "scores.hpp"

// As _Call in cpu.py. What is `..._head` says how many numbers the next KV head's are further on.
struct Call {
    const float *queries;       // [groups, kv_heads, rows, width]
    const void *exact;          // [kv_heads, capacity, width], fp16 or fp32
    const std::uint8_t *codes;  // [kv_heads, places, bytes]
    const float *steps, *scales;        // [kv_heads, volumes, width], [kv_heads, leaves]
    const void *strays, *bases; // [kv_heads, strays, width] and, of leaves, [kv_heads, leaves, width], as exact
    const std::int32_t *places, *groups, *numbers;      // of lines: [kv_heads or 1, lines], [lines], as places
    const float *sizes;         // of lines, as places
    const void *leaves;         // [kv_heads, leaves, width], fp16 or fp32
    const std::int32_t *pages;  // [kv_heads, leaves, leaf]; ~number of a stray
    const float *leaf_size, *page_sizes;                // [1], [pages]
    const std::int64_t *through;                        // group, first leaf and the one behind the last, [stretches, 3]
    std::int32_t *found;        // [kv_heads, stretches x opened x leaf + lines]
    float *votes;               // as found
    std::int64_t kv_heads, rows, width;
    std::int64_t exact_half, exact_head, offset;
    std::int64_t codes_head, steps_head, scales_head, base, stop, volume, strays_head, first_stray, bases_head, first_base, of_base;
    std::int64_t lines, places_head, numbers_head, sizes_head;
    std::int64_t leaves_half, leaves_head, pages_head, leaf, first_place, first_page, opened, stretches;
};

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

std::size_t rounded_up(std::size_t count) {
    return (count + LANES - 1) / LANES * LANES;
}

// Adds up what each row gives each column, of scores [rows, columns] that are `stride` apart. room, votes: [columns].
void spread(const float *scores, std::size_t rows, std::size_t stride, std::size_t columns, float *room, float *votes) {
    std::fill_n(votes, columns, 0.0f);
    for (std::size_t row = 0; row < rows; ++row, scores += stride) {
        Vector most = Vector{} + NOTHING, total = {};
        for (std::size_t at = 0; at < columns; at += LANES)
            most = greater(load(scores + at), most);
        float top = most[0];
        for (std::size_t lane = 1; lane < LANES; ++lane)
            top = std::max(top, most[lane]);
        for (std::size_t at = 0; at < columns; at += LANES) {
            const Vector share = exponential(load(scores + at) - top);
            store(room + at, share);
            total += share;
        }
        const float scale = 1 / sum(total);
        for (std::size_t at = 0; at < columns; at += LANES)
            store(votes + at, load(votes + at) + load(room + at) * scale);
    }
}

constexpr std::size_t BASES = 64;      // leaves whose pages' codes are scored at a time
constexpr float MIDDLE = 7.5f;         // where a code of 4 bits stands for no difference

// Columns of scores are lines, leaves, and from a multiple of LANES on opened pages; -inf where there is none.
class Head {
public:
    Head(const Call &call, std::int64_t head)
        : call_(call), head_(head), rows_(call.rows), width_(call.width), lines_(call.lines),
          opened_(call.stretches * call.opened * call.leaf) {
        for (std::int64_t each = 0; each < call.stretches; ++each)
            leaves_ += call.through[3 * each + 2] - call.through[3 * each + 1];
        behind_ = rounded_up(lines_ + leaves_);
        columns_ = behind_ + rounded_up(opened_);
        // What is read most first: whole vectors are, and one that crosses a line of the cache costs two.
        const std::size_t most = std::max(leaves_, opened_);
        const std::size_t sizes[] = {MANY_KEYS * width_, rows_ * columns_, columns_, columns_, rows_ * width_, rows_ * BASES,
                                     rows_, most, most};
        // Not written beforehand: most of it is room for scores.
        room_.reset(static_cast<float *>(::operator new[](
            std::accumulate(std::begin(sizes), std::end(sizes), std::size_t{0}) * sizeof(float), std::align_val_t{LINE})));
        float *begin = room_.get(), *places;
        float **parts[] = {&turned_, &scores_, &shares_, &votes_, &folded_, &bases_, &added_, &sizes_, &places};
        for (std::size_t part = 0; part < std::size(sizes); begin += sizes[part++])
            *parts[part] = begin;
        places_ = reinterpret_cast<std::int32_t *>(places);
        for (std::size_t row = 0; row < rows_; ++row) {
            std::fill_n(scores_ + row * columns_ + lines_ + leaves_, behind_ - lines_ - leaves_, NOTHING);
            std::fill_n(scores_ + row * columns_ + behind_ + opened_, columns_ - behind_ - opened_, NOTHING);
        }
    }

    void vote() {
        score_lines();
        if (call_.stretches) {
            score_leaves();
            spread(scores_, rows_, columns_, behind_, shares_, votes_);
            open_leaves();
        }
        spread(scores_, rows_, columns_, columns_, shares_, votes_);
        float *votes = call_.votes + head_ * (opened_ + lines_);
        if (call_.stretches) {      // what has no size is a candidate elsewhere
            choose(votes_ + behind_, sizes_, opened_, votes);
            choose(votes_, call_.sizes + head_ * call_.sizes_head, lines_, votes + opened_);
        } else
            std::copy_n(votes_, lines_, votes);
    }

private:
    static void choose(const float *votes, const float *sizes, std::size_t count, float *chosen) {
        for (std::size_t page = 0; page < count; ++page)
            chosen[page] = sizes[page] == NOTHING ? -1.0f : votes[page];
    }

    Queries queries(std::int64_t group) const {
        return {call_.queries + (group * call_.kv_heads + head_) * rows_ * width_, rows_, width_};
    }

    Scores to(std::size_t column, const float *sizes) const {
        return {scores_ + column, columns_, sizes, added_};
    }

    void score_lines() {
        const std::int32_t *places = call_.places + head_ * call_.places_head;
        const float *sizes = call_.sizes + head_ * call_.sizes_head;
        for (std::size_t begin = 0; begin < lines_;) {
            const std::int32_t group = call_.groups[begin];
            const std::size_t end = std::upper_bound(call_.groups + begin, call_.groups + lines_, group) - call_.groups;
            score_pages(queries(group), begin, end - begin, places + begin, sizes + begin);
            begin = end;
        }
    }

    void score_leaves() {
        std::size_t column = lines_;
        std::fill_n(sizes_, leaves_, *call_.leaf_size);
        std::fill_n(added_, rows_, 0.0f);
        for (std::int64_t each = 0; each < call_.stretches; ++each) {
            const std::int64_t *stretch = call_.through + 3 * each;
            const std::size_t count = stretch[2] - stretch[1];
            const auto score_those = [&](const auto *entries) {
                entries += head_ * call_.leaves_head + stretch[1] * width_;
                score(queries(stretch[0]), count, [&](std::size_t leaf) { return entries + leaf * width_; }, turned_,
                      to(column, sizes_));
            };
            if (call_.leaves_half)
                score_those(static_cast<const Half *>(call_.leaves));
            else
                score_those(static_cast<const float *>(call_.leaves));
            column += count;
        }
    }

    // Of each stretch's leaves, the best by votes_ give way to their pages. What stays closed keeps its share: else a row that
    // wants a bit of everything had more say in what is open.
    void open_leaves() {
        const std::int32_t *pages = call_.pages + head_ * call_.pages_head;
        std::int32_t *found = call_.found + head_ * (opened_ + lines_);
        std::size_t column = lines_, done = 0;
        for (std::int64_t each = 0; each < call_.stretches; ++each) {
            const std::int64_t *stretch = call_.through + 3 * each;
            const std::size_t count = stretch[2] - stretch[1];
            find_best(votes_ + column, count);
            const std::size_t begin = done;
            for (const std::size_t best : best_) {
                const std::int64_t leaf = stretch[1] + best;
                const std::int32_t *those = pages + leaf * call_.leaf;
                std::iota(places_ + done, places_ + done + call_.leaf, call_.first_place + leaf * call_.leaf);
                std::copy_n(those, call_.leaf, found + done);
                for (std::int64_t page = 0; page < call_.leaf; ++page) {
                    if (those[page] < 0) {      // a stray
                        found[done + page] = ~those[page];
                        sizes_[done + page] = NOTHING;
                    } else
                        sizes_[done + page] = call_.page_sizes[those[page] - call_.first_page];
                }
                done += call_.leaf;
                for (std::size_t row = 0; row < rows_; ++row)
                    scores_[row * columns_ + column + best] = NOTHING;
            }
            score_pages(queries(stretch[0]), behind_ + begin, done - begin, places_ + begin, sizes_ + begin);
            column += count;
        }
        std::copy_n(call_.numbers + head_ * call_.numbers_head, lines_, found + done);
    }

    // The leaves with most of these votes; ascending, so that those of one range are side by side. The first of equal ones.
    void find_best(const float *votes, std::size_t count) {
        // A number from 0 on has greater bits than another if it is greater. So the least one of the best is found bit by bit, each
        // time in a count of many at a time, where sorting would look at one after the other.
        std::int32_t *bits = places_;
        std::transform(votes, votes + count, bits, [](float each) {
            return each >= 0 ? read<std::int32_t>(&each) : -1;      // a query that is no number has votes that are none
        });
        const auto from = [&](std::int32_t least) {     // counted in 32 bits, as wide as what is compared
            std::int32_t found = 0;
            for (std::size_t leaf = 0; leaf < count; ++leaf)
                found += bits[leaf] >= least;
            return found;
        };
        std::int32_t least = -1;
        for (std::int32_t most = 0x7f800000; least < most;) {   // of the infinite one
            const std::int32_t middle = most - (most - least) / 2;
            if (from(middle) >= call_.opened)
                least = middle;
            else
                most = middle - 1;
        }
        std::int64_t equal = call_.opened - from(least + 1);
        best_.clear();
        for (std::size_t leaf = 0; leaf < count; ++leaf)
            if (bits[leaf] > least || (bits[leaf] == least && equal-- > 0))
                best_.push_back(leaf);
    }

    // Scores of pages at places, side by side from a column on; strays together, and codes of one volume.
    void score_pages(const Queries &asked, std::size_t column, std::size_t count, const std::int32_t *places,
                     const float *sizes) {
        for (std::size_t begin = 0; begin < count;) {
            std::int64_t first = call_.stop, stop = std::numeric_limits<std::int64_t>::max();
            if (places[begin] < 0) {
                first = std::numeric_limits<std::int64_t>::min();
                stop = 0;
            } else if (places[begin] < call_.stop) {
                first = places[begin] - (places[begin] - call_.base) % call_.volume;
                stop = std::min(first + call_.volume, call_.stop);
            }
            std::size_t end = begin + 1;
            while (end < count && places[end] >= first && places[end] < stop)
                ++end;
            const std::int32_t *those = places + begin;
            if (first < 0)
                score_pool(asked, call_.strays, call_.strays_head, column + begin, end - begin, sizes + begin,
                           [&](std::size_t page) { return ~those[page] - call_.first_stray; });
            else if (first < call_.stop)
                score_codes(asked, first - call_.base, column + begin, end - begin, those, sizes + begin);
            else
                score_pool(asked, call_.exact, call_.exact_head, column + begin, end - begin, sizes + begin,
                           [&](std::size_t page) { return those[page] + call_.offset; });
            begin = end;
        }
    }

    // Calls back with entries of a pool of this KV head that are there as they are.
    template <class Do>
    void with_pool(const void *pool, std::int64_t pool_head, const Do &with) const {
        if (call_.exact_half)
            with(static_cast<const Half *>(pool) + head_ * pool_head);
        else
            with(static_cast<const float *>(pool) + head_ * pool_head);
    }

    template <class At>
    void score_pool(const Queries &asked, const void *pool, std::int64_t pool_head, std::size_t column, std::size_t count,
                    const float *sizes, const At &at) {
        std::fill_n(added_, rows_, 0.0f);
        with_pool(pool, pool_head, [&](const auto *entries) {
            score(asked, count, [&](std::size_t page) { return entries + at(page) * call_.width; }, turned_, to(column, sizes));
        });
    }

    // An entry is that of its leaf and scale * step * (code - MIDDLE): the steps go into the queries, and what the leaf has is
    // the same for all of its pages. begin: the first code of the volume.
    void score_codes(const Queries &asked, std::int64_t begin, std::size_t column, std::size_t count,
                     const std::int32_t *places, const float *sizes) {
        const float *step = call_.steps + head_ * call_.steps_head + begin / call_.volume * call_.width;
        const float *scale = call_.scales + head_ * call_.scales_head - call_.base / call_.of_base;
        for (std::size_t row = 0; row < rows_; ++row) {
            const float *query = asked.numbers + row * width_;
            float *folded = folded_ + row * width_;
            for (std::size_t at = 0; at < width_; ++at)
                folded[at] = query[at] * step[at];
            Vector total = {};
            std::size_t at = 0;
            for (; at + LANES <= width_; at += LANES)
                total += load(folded + at);
            added_[row] = -MIDDLE * sum(total + load_some(folded + at, width_ - at));
        }
        const std::int64_t bytes = (call_.width + 1) / 2;
        const std::uint8_t *codes = call_.codes + head_ * call_.codes_head - call_.base * bytes;
        score(Queries{folded_, rows_, width_}, count, [&](std::size_t page) { return Nibbles{codes + places[page] * bytes}; },
              turned_, to(column, nullptr));
        std::int64_t leaves[BASES];
        std::size_t ends[BASES];        // of a leaf's pages, as far as they are side by side
        for (std::size_t page = 0; page < count;) {
            std::size_t first = page, found = 0;
            for (; page < count && found < BASES; ++found) {
                leaves[found] = (places[page] - call_.first_base) / call_.of_base;
                const std::int64_t begins = call_.first_base + leaves[found] * call_.of_base;
                while (page < count && places[page] >= begins && places[page] < begins + call_.of_base)
                    ++page;
                ends[found] = page;
            }
            score_bases(asked, leaves, found);
            for (std::size_t row = 0; row < rows_; ++row) {
                float *scores = scores_ + row * columns_ + column;
                for (std::size_t each = 0, at = first; each < found; ++each) {
                    const float own = scale[leaves[each] + call_.first_base / call_.of_base], base = bases_[row * BASES + each];
                    for (; at < ends[each]; ++at)
                        scores[at] = scores[at] * own + base + sizes[at];
                }
            }
        }
    }

    void score_bases(const Queries &asked, const std::int64_t *leaves, std::size_t count) {
        std::fill_n(added_, rows_, 0.0f);
        with_pool(call_.bases, call_.bases_head, [&](const auto *entries) {
            score(asked, count, [&](std::size_t each) { return entries + leaves[each] * call_.width; }, turned_,
                  Scores{bases_, BASES, nullptr, added_});
        });
    }

    struct Freed {
        void operator()(float *room) const {
            ::operator delete[](room, std::align_val_t{LINE});
        }
    };

    const Call &call_;
    const std::int64_t head_;
    const std::size_t rows_, width_, lines_, opened_;
    std::size_t leaves_ = 0, behind_, columns_;     // behind_: of the opened pages, the first
    std::unique_ptr<float[], Freed> room_;
    float *turned_, *scores_, *shares_, *votes_, *folded_, *bases_, *added_, *sizes_;     // parts of it
    std::int32_t *places_;              // as these; of opened pages, or what leaves are told apart by
    std::vector<std::size_t> best_;     // leaves that are opened, counted from the first of their stretch, ascending
};

}  // namespace

// Whether there was room for it.
extern "C" bool statekv_page_votes(const Call *call) {
    try {
        for (std::int64_t head = 0; head < call->kv_heads; ++head)
            Head(*call, head).vote();
        return true;
    } catch (const std::bad_alloc &) {
        return false;
    }
}
