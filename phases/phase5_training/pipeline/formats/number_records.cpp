// Finds records in JSON text, and reads those of plain numbers straight into arrays.
//
// Only what needs no judgement is read here: objects with the expected keys, lists of the expected lengths,
// numbers that fit, text without escapes. The first record that is anything else is handed back unread, and
// orjson decides about it. Built by native.py with the C++ compiler of the machine; without one the Python
// code beside it does the same.
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

// Text between quotes, without escapes and in ASCII; the cursor is at the first quote.
bool text(Cursor& c, const char*& begin, int64_t& length) {
  if (!c.take('"')) return false;
  begin = c.at;
  while (c.more() && *c.at != '"') {
    const unsigned char byte = static_cast<unsigned char>(*c.at);
    if (byte < 0x20 || byte >= 0x80 || byte == '\\') return false;
    ++c.at;
  }
  length = c.at - begin;
  return c.take('"');
}

bool word(Cursor& c, const char* wanted) {
  const int64_t length = static_cast<int64_t>(std::strlen(wanted));
  if (c.end - c.at < length || std::memcmp(c.at, wanted, length) != 0) return false;
  c.at += length;
  return true;
}

bool skip_plain(Cursor& c) {
  const char* begin;
  int64_t length, integer;
  double real;
  if (!c.more()) return false;
  if (*c.at == '"') return text(c, begin, length);
  if (*c.at == 't') return word(c, "true");
  if (*c.at == 'f') return word(c, "false");
  if (*c.at == 'n') return word(c, "null");
  return number(c, integer, real) != kOther;
}

}  // namespace

extern "C" {

struct Column {
  const char* key;
  int64_t key_length;
  int64_t dimensions;  // of one record; 0: a single number
  int64_t shape[4];
  int64_t* integers;  // one of the two is null
  double* floats;
  int64_t saw_float;  // whether a number with a point or an exponent occurred
};

struct Quality {
  double* values;
  int64_t seen;
};
}

namespace {

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

constexpr int kMaxKeys = 16;

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
    if (count == kMaxKeys || !text(c, keys[count], lengths[count])) return false;
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
  const bool whole = object(c, [&](const char* key, int64_t length) {
    for (int64_t i = 0; i < count; ++i) {
      Column& column = columns[i];
      if (length != column.key_length || std::memcmp(key, column.key, length) != 0) continue;
      int64_t size = 1;
      for (int64_t d = 0; d < column.dimensions; ++d) size *= column.shape[d];
      int64_t place = row * size;
      ++found;
      return values(c, column, 0, place);
    }
    if (is(key, length, "quality")) return grade(outer);
    if (!is(key, length, "metadata")) return skip_plain(c);
    nested = true;
    return object(c, [&](const char* name, int64_t size) {
      return is(name, size, "quality") ? grade(inner) : skip_plain(c);
    });
  });
  if (!whole || c.more() || found != count) return false;
  const double value = nested ? inner : outer;
  quality.values[row] = value;
  quality.seen |= !std::isnan(value);
  return true;
}

}  // namespace

extern "C" {

// Reads records 0 to n - 1 of the text into the columns. Returns how many were read: fewer than n where
// record number `result` is not plain.
int64_t forge_read_records(const char* text_, const int64_t* starts, const int64_t* stops, int64_t n,
                           Column* columns, int64_t count, Quality* quality) {
  for (int64_t row = 0; row < n; ++row) {
    Cursor c{text_ + starts[row], text_ + stops[row]};
    if (!record(c, columns, count, row, *quality)) return row;
  }
  return n;
}

// Finds what stands between brackets in a JSON list, from a place outside of it. Returns the number of
// records that end in the text; `state` gets the place of the bracket that closes the list (or -1), and
// the greatest depth of a record.
int64_t forge_find_records(const char* text_, int64_t n, int64_t* starts, int64_t* stops, int64_t room,
                           int64_t* state) {
  int64_t depth = 0, deepest = 0, found = 0;
  state[0] = -1;
  for (int64_t i = 0; i < n; ++i) {
    switch (text_[i]) {
      case '"':
        for (++i; i < n && text_[i] != '"'; ++i)
          if (text_[i] == '\\') ++i;
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
