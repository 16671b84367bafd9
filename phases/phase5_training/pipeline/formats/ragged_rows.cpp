// Rows of different lengths: read from a file, gathered, and padded to one width. Built by native.py; Python
// and numpy do the same in native.py and columns.py.
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kAhead = 8;  // rows that are asked of the memory before their turn

template <class Number>
void pad(const Number* flat, const int64_t* offsets, int64_t n, int64_t width, int64_t fill, int64_t* out) {
  for (int64_t row = 0; row < n; ++row, out += width) {
    const Number* from = flat + offsets[row];
    int64_t length = offsets[row + 1] - offsets[row];
    if (length > width) length = width;
    for (int64_t i = 0; i < length; ++i) out[i] = from[i];
    for (int64_t i = length; i < width; ++i) out[i] = fill;
  }
}

}  // namespace

extern "C" {

// Copies n rows, which begin at `starts` of the flat elements of `size` bytes, to `out`, where they follow each
// other at `offsets`.
void forge_take_rows(const char* flat, int64_t size, const int64_t* starts, const int64_t* offsets, int64_t n,
                     char* out) {
  for (int64_t row = 0; row < n; ++row) {
    if (row + kAhead < n) __builtin_prefetch(flat + starts[row + kAhead] * size);
    std::memcpy(out + offsets[row] * size, flat + starts[row] * size, (offsets[row + 1] - offsets[row]) * size);
  }
}

// Reads n stretches of a file to `out`, one after the other. Returns how many of them were there.
int64_t forge_read_runs(int file, const int64_t* firsts, const int64_t* sizes, int64_t n, char* out) {
  for (int64_t run = 0; run < n; ++run) {
    for (int64_t done = 0; done < sizes[run];) {
      const ssize_t got = pread(file, out, sizes[run] - done, firsts[run] + done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return run;
      done += got;
      out += got;
    }
  }
  return n;
}

// Rows of unsigned bytes, or of signed integers of 4 or 8 bytes, as (n, width) in `out`: cut, or filled up.
void forge_pad_rows(const void* flat, int64_t size, const int64_t* offsets, int64_t n, int64_t width,
                    int64_t fill, int64_t* out) {
  if (size == 1) pad(static_cast<const uint8_t*>(flat), offsets, n, width, fill, out);
  if (size == 4) pad(static_cast<const int32_t*>(flat), offsets, n, width, fill, out);
  if (size == 8) pad(static_cast<const int64_t*>(flat), offsets, n, width, fill, out);
}
}
