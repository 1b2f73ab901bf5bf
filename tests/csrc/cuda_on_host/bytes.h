// Operations on the bytes of a word.
#pragma once

#include <cstdint>

// Bytes of a and b, a's first, chosen by the four digits of `selector`.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned chosen = (selector >> (4 * i)) & 7u;
    result |= static_cast<unsigned>((bytes >> (8 * chosen)) & 0xffu) << (8 * i);
  }
  return result;
}

// All ones in the bytes that are equal.
inline unsigned __vcmpeq4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (unsigned shift = 0; shift < 32; shift += 8) {
    if (((a ^ b) >> shift & 0xffu) == 0) result |= 0xffu << shift;
  }
  return result;
}
