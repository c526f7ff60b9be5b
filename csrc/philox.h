// Philox4x32-10, a counter-based random generator (Salmon et al., SC 2011): the same words on every
// device, and in PyTorch (projects/dn_detr/ops/philox.py).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace dn_detr {

struct Words {
  uint32_t word[4];
};

DN_DETR_HOST_DEVICE Words philox(uint64_t key, Words counter) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  uint32_t *c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c[0];
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u; // golden ratio
    key1 += 0xBB67AE85u; // sqrt(3) - 1
  }
  return counter;
}

} // namespace dn_detr
