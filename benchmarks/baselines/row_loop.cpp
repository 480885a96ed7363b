// GAE as PufferLib's CPU code does it: one serial backward loop per row, nothing vectorised across rows.
// Built on demand by row_loop.py. Masked steps pass the state on unchanged, as verl does.

#include <cstdint>

extern "C" void row_loop_gae(const float* rewards, const float* values, const uint8_t* mask,
                             float* advantages, float* returns, int64_t rows, int64_t steps, float gamma,
                             float lam) {
  const float decay = gamma * lam;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row * steps;
    float next_value = 0.0f;
    float advantage = 0.0f;
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t i = start + t;
      if (mask == nullptr || mask[i]) {
        advantage = rewards[i] + gamma * next_value - values[i] + decay * advantage;
        next_value = values[i];
      }
      advantages[i] = advantage;
      returns[i] = advantage + values[i];
    }
  }
}
