// Rows in lanes, time in blocks: how a recurrence along rows visits a [rows, steps] tensor, n rows by n steps
// at a time. Included by row kernels after lanes.h; plane.h comes before foreach_isa.h.
//
// A lane goes through its row block by block and then takes the row n further on. Blocks lie flush with the
// row's end; what sticks out at its beginning is padded with zeros and never written. Rows some kilobytes
// apart compete for the same few lines of the first-level cache, so there the lanes set off a block after one
// another: 1024 float steps take two thirds of the time. No lane's arithmetic depends on when it sets off.

enum class Order { kFromEnd, kFromStart };

template <class A, Order order>
struct Walk {
  static constexpr int n = Lanes<A>::n;
  // Four lines of the cache apart from first to last: more only lengthens the ragged beginning and end.
  static constexpr int kLines = 4 * 64 / (n * int(sizeof(A)));
  static constexpr int kSpread = n < kLines ? n : kLines;
  static constexpr int kStep = order == Order::kFromEnd ? -n : n;  // to a row's next block
  // How many blocks ahead inputs and outputs are fetched, on into the next row: where they are in no cache,
  // a masked [512, 1024] takes two thirds of the time; where they are, 1 % more.
  static constexpr int kAhead = 8;

  int64_t row[n];    // the row of each lane; `end` and beyond: no more work
  int64_t since[n];  // the round in which the lane began it, or will
  int64_t end, steps, blocks, rounds;
  int64_t round = -1;
  int64_t turn = 0;                     // the next round in which some lane begins a row
  bool turned = false;                  // whether this is one
  bool working = false, whole = false;  // every lane has a block; one that lies within its row

  // `distance` is that of neighbouring rows in bytes.
  Walk(int64_t begin, int64_t end, int64_t steps, int64_t distance)
      : end(end), steps(steps), blocks((steps + n - 1) / n) {
    const bool spread = distance % 1024 == 0 && blocks >= 4 * kSpread;
    for (int i = 0; i < n; ++i) {
      row[i] = begin + i;
      since[i] = spread ? i % kSpread : 0;
    }
    rounds = blocks * ((end - begin + n - 1) / n) + (spread && blocks ? kSpread - 1 : 0);
  }

  // Moves every lane one block on; false when all rows are done.
  bool next() {
    if (++round >= rounds || blocks == 0) return false;
    turned = round == turn;
    if (turned) begin_rows();
    const bool sticks_out = steps % n && (order == Order::kFromEnd ? turns() : turned);
    whole = working && !sticks_out;
    return true;
  }

  void begin_rows() {
    int64_t first_event = rounds, idle = 0;
    for (int i = 0; i < n; ++i) {
      const int64_t another = round - since[i] == blocks ? -1 : 0;
      since[i] += another & blocks;
      row[i] += another & n;
      const int64_t event = since[i] + (round < since[i] ? 0 : blocks);
      first_event = event < first_event ? event : first_event;
      idle |= (round - since[i]) | (end - 1 - row[i]);  // negative: not yet set off, or no row
    }
    turn = first_event;
    working = idle >= 0;
  }

  bool turns() const { return round + 1 == turn; }  // some lane is in the last block of its row

  bool works(int i) const { return round >= since[i] && row[i] < end; }

  // Where lane i's block begins: what stays until the next turn, and what moves. Negative where the block
  // sticks out of the row.
  int64_t start(int i) const {
    return steps - n * (order == Order::kFromEnd ? 1 - since[i] : blocks + since[i]);
  }
  int64_t moved() const { return kStep * round; }
  int first(int i) const {
    const int64_t t = start(i) + moved();
    return t < 0 ? int(-t) : 0;
  }

  // Lanes that begin a row in this round.
  RK_INLINE mask_t<A> began() const {
    alignas(sizeof(mask_t<A>)) typename Lanes<A>::Bits lanes[n];
    for (int i = 0; i < n; ++i) lanes[i] = round == since[i] ? -1 : 0;
    mask_t<A> mask;
    __builtin_memcpy(&mask, lanes, sizeof(mask));
    return mask;
  }
};

// Where the lanes' blocks lie in one tensor.
template <class T, class A>
struct Cursor {
  static constexpr int n = Lanes<A>::n;
  Plane<T> plane;
  int64_t offset[n];

  template <Order order>
  RK_INLINE void follow(const Walk<A, order>& walk) {
    if (!walk.turned) return;
    for (int i = 0; i < n; ++i) offset[i] = walk.row[i] * plane.stride + walk.start(i);
    // Else GCC keeps the offsets in vectors and takes them apart again lane by lane.
    asm volatile("" : "+m"(offset));
    fetch_rows(walk);
  }

  // The first blocks of the row that comes after the one which a lane begins.
  template <Order order>
  RK_INLINE void fetch_rows(const Walk<A, order>& walk) const {
    const int64_t blocks = walk.blocks < walk.kAhead ? walk.blocks : walk.kAhead;
    for (int i = 0; i < n; ++i) {
      if (walk.round != walk.since[i] || walk.row[i] + n >= walk.end) continue;
      const T* at = plane.row(walk.row[i] + n) + (order == Order::kFromEnd ? walk.steps - n : 0);
      for (int64_t k = 0; k < blocks; ++k)
        __builtin_prefetch(at + k * walk.kStep, !std::is_const<T>::value, 2);
    }
  }

  // The line of lane i that is due in a while.
  template <Order order>
  RK_INLINE void fetch(const T* base, int i, const Walk<A, order>& walk) const {
    __builtin_prefetch(base + offset[i] + walk.kAhead * walk.kStep, !std::is_const<T>::value, 2);
  }

  template <Order order>
  RK_INLINE T* base(const Walk<A, order>& walk) const {
    T* base = plane.data + walk.moved();
    asm("" : "+r"(base));  // else GCC adds the three parts anew for every lane
    return base;
  }
  template <Order order>
  RK_INLINE T* at(int i, const Walk<A, order>& walk) const {
    return base(walk) + offset[i];
  }
};

// The lanes' blocks, whether or not they lie within their rows; what does not is zero.
template <class T, class A, Order order>
RK_OUTLINE void load_edges(vec_t<A>* to, const Cursor<const T, A>& from, const Walk<A, order>& walk) {
  constexpr int n = Lanes<A>::n;
  for (int i = 0; i < n; ++i) {
    const T* at = from.at(i, walk);
    const int first = walk.first(i);
    if (walk.works(i) && first == 0) {
      to[i] = load_lanes(at);
    } else {
      T padded[n] = {};
      if (walk.works(i)) __builtin_memcpy(padded + first, at + first, (n - first) * sizeof(T));
      to[i] = load_lanes(padded);
    }
  }
}

// rows[i] holds lane i's block.
template <class T, class A, Order order>
RK_INLINE void load_rows(vec_t<A> (&rows)[Lanes<A>::n], Cursor<const T, A>& from,
                         const Walk<A, order>& walk) {
  constexpr int n = Lanes<A>::n;
  from.follow(walk);
  if (walk.whole) {
    const T* base = from.base(walk);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      from.fetch(base, i, walk);
      rows[i] = load_lanes(base + from.offset[i]);
    }
  } else {
    vec_t<A> edges[n];  // apart, so that `rows` need not lie in memory
    load_edges<T, A>(edges, from, walk);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = edges[i];
  }
}

// steps[k] holds step k of every lane's block.
template <class T, class A, Order order>
RK_INLINE void load_steps(vec_t<A> (&steps)[Lanes<A>::n], Cursor<const T, A>& from,
                          const Walk<A, order>& walk) {
  load_rows<T>(steps, from, walk);
  transpose<A>(steps);
}

template <class T, class A, Order order>
RK_OUTLINE void store_edges(const vec_t<A>* from, const Cursor<T, A>& to, const Walk<A, order>& walk) {
  constexpr int n = Lanes<A>::n;
  for (int i = 0; i < n; ++i) {
    if (!walk.works(i)) continue;
    T* at = to.at(i, walk);
    const int first = walk.first(i);
    if (first == 0) {
      store_lanes<T>(at, from[i]);
    } else {
      T padded[n];
      store_lanes<T>(padded, from[i]);
      __builtin_memcpy(at + first, padded + first, (n - first) * sizeof(T));
    }
  }
}

template <class T, class A, Order order>
RK_INLINE void store_rows(const vec_t<A> (&rows)[Lanes<A>::n], Cursor<T, A>& to, const Walk<A, order>& walk) {
  constexpr int n = Lanes<A>::n;
  to.follow(walk);
  if (walk.whole) {
    T* base = to.base(walk);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      to.fetch(base, i, walk);
      store_lanes<T>(base + to.offset[i], rows[i]);
    }
  } else {
    vec_t<A> edges[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) edges[i] = rows[i];
    store_edges<T, A>(edges, to, walk);
  }
}

template <class T, class A, Order order>
RK_INLINE void store_steps(vec_t<A> (&steps)[Lanes<A>::n], Cursor<T, A>& to, const Walk<A, order>& walk) {
  transpose<A>(steps);
  store_rows<T>(steps, to, walk);
}

// One element per row: that of every lane which begins its row.
template <class T, class A, Order order>
RK_OUTLINE void load_starts(vec_t<A>* to, const Plane<const T>& from, const Walk<A, order>& walk) {
  for (int i = 0; i < Lanes<A>::n; ++i)
    if (walk.round == walk.since[i] && walk.row[i] < walk.end) (*to)[i] = load(*from.row(walk.row[i]));
}

// One element per row: that of every lane which is in its row's last block.
template <class T, class A, Order order>
RK_OUTLINE void store_ends(const vec_t<A>* from, const Plane<T>& to, const Walk<A, order>& walk) {
  for (int i = 0; i < Lanes<A>::n; ++i)
    if (walk.round + 1 == walk.since[i] + walk.blocks && walk.row[i] < walk.end)
      *to.row(walk.row[i]) = store<T>((*from)[i]);
}

// Bit k: whether byte k is zero, for n bytes.
template <class A>
RK_INLINE typename Lanes<A>::Bits zero_bytes(const uint8_t* from) {
  constexpr int n = Lanes<A>::n;
#ifdef __SSE2__
  // Through a register of their size: fewer bytes laid into a vector in memory would hold up its load.
  using Word = std::conditional_t<n == 2, uint16_t, std::conditional_t<n == 4, uint32_t, uint64_t>>;
  typedef Word Words __attribute__((vector_size(16)));
  typedef char Bytes __attribute__((vector_size(16)));
  Words words = {};
  if constexpr (n == 16) {
    __builtin_memcpy(&words, from, n);
  } else {
    Word word;
    __builtin_memcpy(&word, from, n);
    words = Words{word};
  }
  return __builtin_ia32_pmovmskb128((Bytes)words == 0);
#else
  typename Lanes<A>::Bits zeros = 0;
  for (int k = 0; k < n; ++k) zeros |= typename Lanes<A>::Bits(from[k] == 0) << k;
  return zeros;
#endif
}

// Those of every lane; `mixed` becomes non-zero unless each is all zeros or has none.
template <class A, class Lane, int... i>
RK_INLINE mask_t<A> zero_bytes(const Lane& lane, typename Lanes<A>::Bits& mixed,
                               std::integer_sequence<int, i...>) {
  using Bits = typename Lanes<A>::Bits;
  constexpr Bits all = (Bits(1) << Lanes<A>::n) - 1;
  const auto noted = [&](Bits zeros) __attribute__((always_inline)) {
    mixed |= (zeros + 1) & (all - 1);
    return zeros;
  };
  return mask_t<A>{noted(zero_bytes<A>(lane(i)))...};
}

// Bit k of lane i: whether step k of its block is set. `mixed`: 0 where all steps of a lane are alike.
template <class A, Order order>
RK_INLINE mask_t<A> load_bits(Cursor<const uint8_t, A>& from, const Walk<A, order>& walk,
                              typename Lanes<A>::Bits& mixed) {
  constexpr int n = Lanes<A>::n;
  constexpr auto lanes = std::make_integer_sequence<int, n>();
  from.follow(walk);
  if (walk.whole) {
    const uint8_t* base = from.base(walk);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) from.fetch(base, i, walk);
    return ~zero_bytes<A>([&](int i) __attribute__((always_inline)) { return base + from.offset[i]; }, mixed,
                          lanes);
  }
  uint8_t padded[n][n] = {};
  for (int i = 0; i < n; ++i) {
    const int first = walk.first(i);
    if (walk.works(i) && first == 0)
      __builtin_memcpy(padded[i], from.at(i, walk), n);
    else if (walk.works(i))
      __builtin_memcpy(padded[i] + first, from.at(i, walk) + first, n - first);
  }
  return ~zero_bytes<A>([&](int i) __attribute__((always_inline)) { return padded[i]; }, mixed, lanes);
}
template <class A, Order order>
RK_INLINE mask_t<A> load_bits(Cursor<const uint8_t, A>& from, const Walk<A, order>& walk) {
  typename Lanes<A>::Bits mixed = 0;
  return load_bits<A>(from, walk, mixed);
}

template <class A>
RK_INLINE mask_t<A> bit(const mask_t<A>& bits, int k) {
  return (bits << int(8 * sizeof(A) - 1 - k)) < 0;  // its sign
}
