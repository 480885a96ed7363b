// To be included first in this room. Its loops are unrolled by hand: -O3 saves no instruction over -O2 there
// and takes 40 % longer. Sanitizers have flags of their own.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
  #pragma GCC optimize("O2")
#endif
