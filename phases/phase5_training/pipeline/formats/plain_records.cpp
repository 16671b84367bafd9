// Finds records in JSON text, and reads those of plain numbers and text straight into arrays.
//
// Only what needs no judgement is read here: objects with the expected keys, each once, lists of the expected
// lengths, numbers that fit, text in UTF-8. A record that is anything else is named, and orjson decides about
// it. Built by native.py with the C++ compiler of the machine; without one the Python code beside it does the
// same.
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Cursor {
  const char* at;
  const char* end;
  bool more() const { return at < end; }
  bool take(char c) {
    if (more() && *at == c) {
      ++at;
      return true;
    }
    return false;
  }
  void space() {
    while (more() && (*at == ' ' || *at == '\n' || *at == '\r' || *at == '\t')) ++at;
  }
};

inline bool digit(char c) { return static_cast<unsigned char>(c - '0') < 10; }

enum Kind { kInteger, kFloat, kOther };

Kind number(Cursor& c, int64_t& integer, double& real) {
  const char* begin = c.at;
  const bool negative = c.take('-');
  const char* first = c.at;
  uint64_t value = 0;
  while (c.more() && digit(*c.at)) value = value * 10 + static_cast<uint64_t>(*c.at++ - '0');
  const int64_t digits = c.at - first;
  if (digits == 0 || (digits > 1 && *first == '0')) return kOther;
  if (c.more() && (*c.at == '.' || *c.at == 'e' || *c.at == 'E')) {
    if (c.take('.')) {
      if (!c.more() || !digit(*c.at)) return kOther;
      while (c.more() && digit(*c.at)) ++c.at;
    }
    if (c.take('e') || c.take('E')) {
      if (!c.take('+')) c.take('-');
      if (!c.more() || !digit(*c.at)) return kOther;
      while (c.more() && digit(*c.at)) ++c.at;
    }
    const auto result = std::from_chars(begin, c.at, real);
    // Floats of 2**63 and beyond may stand for integers; numpy rounds those and Python must look.
    if (result.ec != std::errc() || result.ptr != c.at || !(std::fabs(real) < 9.2e18)) return kOther;
    return kFloat;
  }
  if (digits > 18 || (negative && value == 0)) return kOther;
  integer = negative ? -static_cast<int64_t>(value) : static_cast<int64_t>(value);
  return kInteger;
}

constexpr uint64_t kOnes = 0x0101010101010101, kHighs = 0x8080808080808080;

inline uint64_t eight(const char* at) {
  uint64_t word;
  std::memcpy(&word, at, 8);
  return word;
}

// Has the high bit of a byte where that of `word` is zero.
inline uint64_t zeros(uint64_t word) { return (word - kOnes) & ~word & kHighs; }

inline bool plain(unsigned char byte) { return byte >= 0x20 && byte < 0x80 && byte != '"' && byte != '\\'; }

// Past the ASCII characters that stand for themselves within quotes.
inline const char* past_plain(const char* at, const char* end) {
  while (end - at >= 8 && plain(static_cast<unsigned char>(*at))) {
    const uint64_t word = eight(at);
    const uint64_t below = (word - 0x20 * kOnes) & ~word & kHighs;
    if (below | zeros(word ^ kOnes * '"') | zeros(word ^ kOnes * '\\') | (word & kHighs)) break;
    at += 8;
  }
  while (at < end && plain(static_cast<unsigned char>(*at))) ++at;
  return at;
}

// Bytes of the UTF-8 sequence of more than one at `at`; 0 where there is none (Unicode 15, table 3-7).
inline int64_t sequence(const char* at, const char* end) {
  const auto byte = [&](int64_t i) { return static_cast<unsigned char>(at[i]); };
  const auto within = [&](int64_t i, int low, int high) { return byte(i) >= low && byte(i) <= high; };
  const int first = byte(0);
  const int64_t length = first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
  if (length == 0 || end - at < length) return 0;
  const int low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  const int high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  if (!within(1, low, high)) return 0;
  for (int64_t i = 2; i < length; ++i)
    if (!within(i, 0x80, 0xBF)) return 0;
  return length;
}

bool hexadecimal(Cursor& c, uint32_t& code) {
  if (c.end - c.at < 4) return false;
  code = 0;
  for (int i = 0; i < 4; ++i, ++c.at) {
    const uint32_t byte = static_cast<unsigned char>(*c.at), small = byte | 0x20;
    if (!digit(*c.at) && !(small >= 'a' && small <= 'f')) return false;
    code = code << 4 | ((byte & 15) + 9 * (byte >> 6));
  }
  return true;
}

// What follows a backslash, as UTF-8.
bool escape(Cursor& c, char*& out) {
  if (!c.more()) return false;
  const char kind = *c.at++;
  uint32_t code, low;
  if (kind != 'u') {
    const char* from = "\"\\/bfnrt";
    const char* found = kind == '\0' ? nullptr : std::strchr(from, kind);
    if (found == nullptr) return false;
    *out++ = "\"\\/\b\f\n\r\t"[found - from];
    return true;
  }
  if (!hexadecimal(c, code)) return false;
  if (code >= 0xD800 && code < 0xE000) {  // half of a pair
    if (code >= 0xDC00 || !c.take('\\') || !c.take('u') || !hexadecimal(c, low)) return false;
    if (low < 0xDC00 || low >= 0xE000) return false;
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  const auto put = [&](uint32_t byte) { *out++ = static_cast<char>(byte); };
  const auto follow = [&](int shift) { put(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    follow(0);
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    follow(6);
    follow(0);
  } else {
    put(0xF0 | code >> 18);
    follow(12);
    follow(6);
    follow(0);
  }
  return true;
}

// Text between quotes, the cursor at the first one; with kKeep its UTF-8 goes to `out`, which is moved on. It
// takes no more room than what stands between the quotes.
template <bool kKeep>
bool text(Cursor& c, char*& out) {
  if (!c.take('"')) return false;
  while (true) {
    const char* run = c.at;
    c.at = past_plain(c.at, c.end);
    while (c.more() && static_cast<signed char>(*c.at) < 0) {
      const int64_t length = sequence(c.at, c.end);
      if (length == 0) return false;
      c.at += length;
      if (c.more() && plain(static_cast<unsigned char>(*c.at))) c.at = past_plain(c.at, c.end);
    }
    if (kKeep) {
      // Between two escapes there is often nothing, or a letter.
      if (c.at - run < 8) {
        while (run < c.at) *out++ = *run++;
      } else {
        std::memcpy(out, run, c.at - run);
        out += c.at - run;
      }
    }
    if (c.take('"')) return true;
    if (!c.take('\\')) return false;
    char unused[4];
    char* aside = unused;
    if (!escape(c, kKeep ? out : aside)) return false;
  }
}

// A key without escapes.
bool name(Cursor& c, const char*& begin, int64_t& length) {
  begin = c.at + 1;
  char* unused = nullptr;
  if (!text<false>(c, unused)) return false;
  length = c.at - 1 - begin;
  return std::memchr(begin, '\\', length) == nullptr;
}

bool word(Cursor& c, const char* wanted) {
  const int64_t length = static_cast<int64_t>(std::strlen(wanted));
  if (c.end - c.at < length || std::memcmp(c.at, wanted, length) != 0) return false;
  c.at += length;
  return true;
}

}  // namespace

extern "C" {

struct Column {
  const char* key;
  int64_t key_length;
  int64_t dimensions;  // of one record; 0: a single number
  int64_t shape[4];
  int64_t* integers;  // all but one of the three are null
  double* floats;
  char* text;        // of one record after the other, in UTF-8
  int64_t* offsets;  // record i is text[offsets[i]] to text[offsets[i + 1]]
  int64_t saw_float;  // whether a number with a point or an exponent occurred
};

struct Quality {
  double* values;
  int64_t seen;
};
}

namespace {

// As json_checks.py: levels of nesting within a record.
constexpr int kMaxDepth = 64;

bool values(Cursor& c, Column& column, int64_t dimension, int64_t& place) {
  if (dimension == column.dimensions) {
    int64_t integer;
    double real;
    const Kind kind = number(c, integer, real);
    if (kind == kOther) return false;
    column.saw_float |= kind == kFloat;
    if (column.floats != nullptr) {
      column.floats[place++] = kind == kFloat ? real : static_cast<double>(integer);
      return true;
    }
    if (kind == kFloat) return false;
    column.integers[place++] = integer;
    return true;
  }
  if (!c.take('[')) return false;
  for (int64_t i = 0; i < column.shape[dimension]; ++i) {
    c.space();
    if (i > 0) {
      if (!c.take(',')) return false;
      c.space();
    }
    if (!values(c, column, dimension + 1, place)) return false;
  }
  c.space();
  return c.take(']');
}

constexpr int kMaxKeys = 64;

// The members of an object; `member(key, length)` reads the value.
template <class Member>
bool object(Cursor& c, Member member) {
  const char* keys[kMaxKeys];
  int64_t lengths[kMaxKeys];
  int count = 0;
  if (!c.take('{')) return false;
  c.space();
  if (c.take('}')) return true;
  while (true) {
    if (count == kMaxKeys || !name(c, keys[count], lengths[count])) return false;
    for (int i = 0; i < count; ++i)
      if (lengths[i] == lengths[count] && std::memcmp(keys[i], keys[count], lengths[i]) == 0) return false;
    c.space();
    if (!c.take(':')) return false;
    c.space();
    if (!member(keys[count], lengths[count])) return false;
    ++count;
    c.space();
    if (c.take('}')) return true;
    if (!c.take(',')) return false;
    c.space();
  }
}

// Any value, passed over, `depth` brackets within its record.
bool skip(Cursor& c, int depth) {
  if (!c.more()) return false;
  switch (*c.at) {
    case '"': {
      char* unused = nullptr;
      return text<false>(c, unused);
    }
    case 't':
      return word(c, "true");
    case 'f':
      return word(c, "false");
    case 'n':
      return word(c, "null");
    case '{':
      return depth < kMaxDepth && object(c, [&](const char*, int64_t) { return skip(c, depth + 1); });
    case '[':
      if (depth == kMaxDepth) return false;
      ++c.at;
      c.space();
      if (c.take(']')) return true;
      while (skip(c, depth + 1)) {
        c.space();
        if (c.take(']')) return true;
        if (!c.take(',')) return false;
        c.space();
      }
      return false;
    default: {
      int64_t integer;
      double real;
      return number(c, integer, real) != kOther;
    }
  }
}

bool is(const char* key, int64_t length, const char* wanted) {
  return length == static_cast<int64_t>(std::strlen(wanted)) && std::memcmp(key, wanted, length) == 0;
}

bool record(Cursor& c, Column* columns, int64_t count, int64_t row, Quality& quality) {
  int64_t found = 0;
  double inner = std::nan(""), outer = std::nan("");
  bool nested = false;
  const auto grade = [&](double& into) {
    if (c.more() && *c.at == 'n') return word(c, "null");
    int64_t integer;
    const Kind kind = number(c, integer, into);
    if (kind == kInteger) into = static_cast<double>(integer);
    return kind != kOther;
  };
  c.space();
  const bool whole = object(c, [&](const char* key, int64_t length) {
    for (int64_t i = 0; i < count; ++i) {
      Column& column = columns[i];
      if (length != column.key_length || std::memcmp(key, column.key, length) != 0) continue;
      ++found;
      if (column.text != nullptr) {
        char* out = column.text + column.offsets[row];
        if (!text<true>(c, out)) return false;
        column.offsets[row + 1] = out - column.text;
        return true;
      }
      int64_t size = 1;
      for (int64_t d = 0; d < column.dimensions; ++d) size *= column.shape[d];
      int64_t place = row * size;
      return values(c, column, 0, place);
    }
    if (is(key, length, "quality")) return grade(outer);
    if (!is(key, length, "metadata") || !c.more() || *c.at != '{') return skip(c, 1);
    nested = true;
    return object(c, [&](const char* name, int64_t size) {
      return is(name, size, "quality") ? grade(inner) : skip(c, 2);
    });
  });
  c.space();
  if (!whole || c.more() || found != count) return false;
  const double value = nested ? inner : outer;
  quality.values[row] = value;
  quality.seen |= !std::isnan(value);
  return true;
}

}  // namespace

extern "C" {

// Reads records 0 to n - 1 of the text into the columns. Those that are not plain get a 1 in `odd` and
// nothing sound in the columns; where there are more than `most` of them the rest is not looked at. Returns
// how many there are.
int64_t forge_read_records(const char* text_, const int64_t* starts, const int64_t* stops, int64_t n,
                           Column* columns, int64_t count, Quality* quality, char* odd, int64_t most) {
  int64_t unread = 0;
  for (int64_t row = 0; row < n && unread <= most; ++row) {
    const Quality before = *quality;
    int64_t floats = 0;
    for (int64_t i = 0; i < count; ++i) floats |= (columns[i].saw_float != 0) << i;
    Cursor c{text_ + starts[row], text_ + stops[row]};
    if (record(c, columns, count, row, *quality)) continue;
    odd[row] = 1;
    ++unread;
    *quality = before;
    for (int64_t i = 0; i < count; ++i) {
      if (columns[i].text != nullptr) columns[i].offsets[row + 1] = columns[i].offsets[row];
      // A float ends the reading of integers; among floats, one of a record that is not read says nothing.
      if (columns[i].floats != nullptr) columns[i].saw_float = floats >> i & 1;
    }
  }
  return unread;
}

// Which of the records are JSON without equal keys and not nested too deep; 0 where in doubt.
void forge_check_records(const char* text_, const int64_t* starts, const int64_t* stops, int64_t n,
                         char* sound) {
  for (int64_t row = 0; row < n; ++row) {
    Cursor c{text_ + starts[row], text_ + stops[row]};
    c.space();
    sound[row] = skip(c, 0);
    c.space();
    if (c.more()) sound[row] = 0;
  }
}

// Finds what stands between brackets in a JSON list, from a place outside of it. Returns the number of
// records that end in the text; `state` gets the place of the bracket that closes the list (or -1), and
// the greatest depth of a record.
int64_t forge_find_records(const char* text_, int64_t n, int64_t* starts, int64_t* stops, int64_t room,
                           int64_t* state) {
  int64_t depth = 0, deepest = 0, found = 0;
  state[0] = -1;
  for (int64_t i = 0; i < n; ++i) {
    // Past what is neither a quote nor, but for one bit, a bracket.
    for (uint64_t word; n - i >= 8; i += 8) {
      word = eight(text_ + i) | 0x20 * kOnes;
      if (zeros(word ^ kOnes * '"') | zeros(word ^ kOnes * '{') | zeros(word ^ kOnes * '}')) break;
    }
    if (i == n) break;
    switch (text_[i]) {
      case '"':
        for (++i; i < n && text_[i] != '"'; ++i) {
          for (uint64_t word; n - i >= 8; i += 8) {
            word = eight(text_ + i);
            if (zeros(word ^ kOnes * '"') | zeros(word ^ kOnes * '\\')) break;
          }
          if (i == n || text_[i] == '"') break;
          if (text_[i] == '\\') ++i;
        }
        break;
      case '[':
      case '{':
        if (depth == 0) {
          if (found == room) {
            state[1] = deepest;
            return found;
          }
          starts[found] = i;
        }
        if (++depth > deepest) deepest = depth;
        break;
      case ']':
      case '}':
        if (--depth == 0) stops[found++] = i + 1;
        if (depth < 0) {
          state[0] = i;
          state[1] = deepest;
          return found;
        }
        break;
      default:
        break;
    }
  }
  state[1] = deepest;
  return found;
}
}
