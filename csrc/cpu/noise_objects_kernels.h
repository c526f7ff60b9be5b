// Philox (see philox.h) for many counters at once, which takes most of the time of the operator. No
// include guard: compiled once per instruction set.

// words[i][n]: word i of the draw of each object in its stream.
void draw_many(
    int64_t key,
    const uint32_t* object,
    const uint32_t* stream,
    uint32_t id,
    uint32_t (*words)[DRAWS]) {
  const auto bits = static_cast<uint64_t>(key);
  auto key0 = static_cast<uint32_t>(bits), key1 = static_cast<uint32_t>(bits >> 32);
  for (int n = 0; n < DRAWS; ++n) {
    words[0][n] = object[n];
    words[1][n] = stream[n];
    words[2][n] = id;
    words[3][n] = 0;
  }
  for (int round = 0; round < 10; ++round) {
    for (int n = 0; n < DRAWS; ++n) {
      const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * words[0][n];
      const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * words[2][n];
      words[0][n] = static_cast<uint32_t>(product1 >> 32) ^ words[1][n] ^ key0;
      words[2][n] = static_cast<uint32_t>(product0 >> 32) ^ words[3][n] ^ key1;
      words[1][n] = static_cast<uint32_t>(product1);
      words[3][n] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}
