r"""How JSON writes strings and numbers, as languages over characters (RFC 8259).

A string has one writing: every character as it is but `"`, `\` and control characters, which have their short escape, or `\u00` and two
small hexadecimal digits where there is none. So writes `json.dumps(..., ensure_ascii=False)`. An integer has one writing, too; a number has
several.

Knows nothing of schemas.
"""

from decimal import Decimal
from functools import cache

from .expression import EMPTY, LAST, NOTHING, Both, Chars, Either, Except, Expression, Join, Repeat, chars, text
from .regex import either, joined, meet, parse_regex

DIGITS = 19  # before the point: every signed integer of 64 bits; the value of a text stays finite
FRACTION_DIGITS = 15  # two decimals of up to 15 digits never are the same double

SHORT = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
RAW = chars((0x20, 0x21), (0x23, 0x5B), (0x5D, LAST))
ESCAPED = {ord(character): f"\\{letter}" for character, letter in SHORT.items()}
ESCAPED = {point: f"\\u{point:04x}" for point in range(0x20)} | ESCAPED

# RFC 3339; every text of them is one that `datetime` reads. No leap second, and a fraction of at most a microsecond.
LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
YEAR = "(?:[1-9][0-9]{3}|0(?:[1-9][0-9]{2}|0(?:[1-9][0-9]|0[1-9])))"
DAY = "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
DATE = f"(?:{YEAR}-{DAY}|{LEAP_YEAR}-02-29)"
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "email": rf"{ATOM}(?:\.{ATOM})*@(?:{LABEL}\.)+[A-Za-z]{{2,}}",
    "ipv4": rf"{OCTET}(?:\.{OCTET}){{3}}",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}

DIGIT = chars((ord("0"), ord("9")))
POINT, ZEROS = text("."), Repeat(text("0"), 0, None)
FRACTION = either([EMPTY, joined(POINT, Repeat(DIGIT, 1, None))])


@cache
def format_language(name: str) -> Expression:
    """The decoded strings of one of `FORMATS`."""
    return parse_regex(FORMATS[name])


def json_string(decoded: Expression) -> Expression:
    """How JSON writes the strings of a language, in quotes."""
    return joined(text('"'), _written(decoded, {}), text('"'))


def _written(decoded: Expression, known: dict[Chars, Expression]) -> Expression:
    """In the place of each character its writing.

    Both and Except stay what they are: a string is written in one way, and no two strings in the same, so that a writing is of both
    languages where its string is of both (test_string_keywords_hold_together).
    """
    match decoded:
        case Chars():
            if decoded not in known:
                known[decoded] = _written_character(decoded)
            return known[decoded]
        case Join(inner):
            return joined(*(_written(each, known) for each in inner))
        case Either(options):
            return either(_written(each, known) for each in options)
        case Repeat(body, least, most):
            return Repeat(_written(body, known), least, most)
        case Both(left, right):
            return Both(_written(left, known), _written(right, known))
        case Except(left, right):
            return Except(_written(left, known), _written(right, known))


def _written_character(some: Chars) -> Expression:
    """Those that stand for themselves, and by what their escapes begin with: one class of last characters each."""
    endings: dict[str, list[tuple[int, int]]] = {}
    for point, escape in ESCAPED.items():
        if any(first <= point <= last for first, last in some.ranges):
            endings.setdefault(escape[:-1], []).append((ord(escape[-1]), ord(escape[-1])))
    return either([meet(some, RAW), *(joined(text(begin), chars(*ends)) for begin, ends in endings.items())])


def integers(least: int | None = None, most: int | None = None) -> Expression:
    """The integers from `least` to `most`, of up to 19 digits: no sign before 0, no zeros before other digits."""
    limit = 10**DIGITS - 1
    least, most = (-limit if least is None else max(least, -limit)), (limit if most is None else min(most, limit))
    options = []
    if most >= 0:
        options.append(_whole(max(least, 0), most) if least <= most else NOTHING)
    if least < 0:
        options.append(joined(text("-"), _whole(max(-most, 1), -least)) if least <= most else NOTHING)
    return either(options)


def _whole(least: int, most: int) -> Expression:
    """The integers from `least`, at least 0, to `most`."""
    if least == 0:
        return _at_most(str(most))
    if most == 10**DIGITS - 1:
        return _at_least(str(least))
    return Both(_at_least(str(least)), _at_most(str(most)))


def _digits(first: int, last: int) -> Expression:
    """One digit; nothing where there is none."""
    return chars((ord("0") + first, ord("0") + last)) if first <= last else NOTHING


def _at_most(bound: str) -> Expression:
    """The integers from 0 to one of these digits."""
    if set(bound) == {"9"}:
        return either([text("0"), joined(_digits(1, 9), Repeat(DIGIT, 0, len(bound) - 1))])
    shorter = [_digits(0, 9), *([joined(_digits(1, 9), Repeat(DIGIT, 1, len(bound) - 2))] if len(bound) > 2 else [])]
    same = EMPTY
    for place, digit in reversed(list(enumerate(bound))):
        below = _digits(0 if place or len(bound) == 1 else 1, int(digit) - 1)
        same = either([joined(below, Repeat(DIGIT, len(bound) - place - 1, len(bound) - place - 1)), joined(text(digit), same)])
    return either([*(shorter if len(bound) > 1 else []), same])


def _at_least(bound: str) -> Expression:
    """The integers from one of these digits on, up to 19 digits."""
    same = EMPTY
    for place, digit in reversed(list(enumerate(bound))):
        rest = len(bound) - place - 1
        same = either([joined(_digits(int(digit) + 1, 9), Repeat(DIGIT, rest, rest)), joined(text(digit), same)])
    longer = joined(_digits(1, 9), Repeat(DIGIT, len(bound), DIGITS - 1)) if len(bound) < DIGITS else NOTHING
    return either([same, longer])


SIGNED = Repeat(chars((ord("+"), ord("+")), (ord("-"), ord("-"))), 0, 1)
EXPONENT = joined(chars((ord("e"), ord("e")), (ord("E"), ord("E"))), SIGNED, Repeat(DIGIT, 1, 2))
NUMBER = joined(either([EMPTY, text("-")]), integers(0), FRACTION, either([EMPTY, EXPONENT]))
"""Up to 19 digits before the point, any number of digits behind it, an exponent of up to two digits: below 1e119."""


def decimals(least: Decimal | None, most: Decimal | None, above: bool, below: bool) -> Expression:
    """The numbers from `least` to `most` without exponent, of up to 19 digits before the point; `above`, `below`: without the bound itself.

    A reader rounds a decimal to the next double, which keeps an order but may make two of them one: without a bound itself so many digits
    behind the point that no text of them rounds to it.
    """
    options = []
    if most is None or most >= 0:
        options.append(_magnitudes(least if least is not None and least >= 0 else None, most, above, below))
    if least is None or least < 0:
        near = None if most is None or most > 0 else -most
        options.append(joined(text("-"), _magnitudes(near, None if least is None else -least, below, above)))
    return either(options)


def _magnitudes(least: Decimal | None, most: Decimal | None, above: bool, below: bool) -> Expression:
    found = [_decimals_from(least, above)] if least is not None else []
    found += [_decimals_to(most, below)] if most is not None else []
    for bound, strict in ((least, above), (most, below)):
        if bound is not None and strict:
            whole, _ = _digits_of(bound)
            most_digits = FRACTION_DIGITS - (len(whole) if bound >= 1 else 0)
            found.append(joined(integers(0), either([EMPTY, joined(POINT, Repeat(DIGIT, 1, most_digits)) if most_digits else NOTHING])))
    if not found:
        return joined(integers(0), FRACTION)
    result = found[0]
    for other in found[1:]:
        result = NOTHING if NOTHING in (result, other) else Both(result, other)
    return result


def _digits_of(bound: Decimal) -> tuple[str, str]:
    """Before and behind the point; behind it without zeros at the end."""
    whole, _, fraction = format(bound, "f").partition(".")
    return whole, fraction.rstrip("0")


def _decimals_from(bound: Decimal, strict: bool) -> Expression:
    """The decimals of at least `bound`, itself at least 0; above it if strict."""
    whole, fraction = _digits_of(bound)
    more = joined(ZEROS, _digits(1, 9), Repeat(DIGIT, 0, None)) if strict else Repeat(DIGIT, 0, None)
    for digit in reversed(fraction):
        more = either([joined(_digits(int(digit) + 1, 9), Repeat(DIGIT, 0, None)), joined(text(digit), more)])
    same = joined(POINT, more) if fraction or strict else FRACTION
    return either([joined(integers(int(whole) + 1), FRACTION), joined(text(whole), same)])


def _decimals_to(bound: Decimal, strict: bool) -> Expression:
    """The decimals from 0 to `bound`; below it if strict."""
    whole, fraction = _digits_of(bound)
    less = NOTHING if strict else ZEROS
    for place, digit in reversed(list(enumerate(fraction))):
        if place < len(fraction) - 1:
            less = either([EMPTY, less])
        less = either([joined(_digits(0, int(digit) - 1), Repeat(DIGIT, 0, None)), joined(text(digit), less)])
    if fraction:
        same = either([EMPTY, joined(POINT, less)])
    else:
        same = NOTHING if strict else either([EMPTY, joined(POINT, Repeat(text("0"), 1, None))])
    smaller = joined(integers(0, int(whole) - 1), FRACTION) if int(whole) else NOTHING
    return either([smaller, joined(text(whole), same)])


__all__ = ["DIGITS", "FORMATS", "FRACTION_DIGITS", "NUMBER", "decimals", "format_language", "integers", "json_string"]
