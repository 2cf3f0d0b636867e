"""What tests of languages over characters share: membership and random strings, straight from what an expression says."""

from generation.constraints.expression import Both, Chars, Either, Except, Expression, Join, Repeat


def holds(expression: Expression, string: str) -> bool:
    """Whether a string is of the language: by every place at which a match may end, for every place at which it may begin."""
    known = {}

    def ends(language, begin):
        key = (id(language), begin)
        if key not in known:
            known[key] = frozenset(find(language, begin))
        return known[key]

    def find(language, begin):
        match language:
            case Chars(ranges):
                inside = begin < len(string) and any(first <= ord(string[begin]) <= last for first, last in ranges)
                return {begin + 1} if inside else set()
            case Join(pieces):
                found = {begin}
                for piece in pieces:
                    found = {end for place in found for end in ends(piece, place)}
                return found
            case Either(options):
                return {end for option in options for end in ends(option, begin)}
            case Both(left, right):
                return ends(left, begin) & ends(right, begin)
            case Except(left, right):
                return ends(left, begin) - ends(right, begin)
            case Repeat(body, least, most):
                found, reached, count = set(), {begin}, 0
                while reached and (most is None or count <= most):
                    if count >= least:
                        if most is None and reached <= found:
                            break
                        found |= reached
                    reached, count = {end for place in reached for end in ends(body, place)}, count + 1
                return found

    return len(string) in ends(expression, 0)


class NoString(Exception):
    """None was found in some tries."""


def sample(expression: Expression, random, longest: int = 3) -> str:
    """A random string of the language; repetitions up to `longest` times beyond their least. Raises NoString where it finds none."""
    match expression:
        case Chars(ranges):
            if not ranges:
                raise NoString
            first, last = random.choice(ranges)
            return chr(random.randint(first, min(last, first + 300)))
        case Join(pieces):
            return "".join(sample(piece, random, longest) for piece in pieces)
        case Either(options):
            if not options:
                raise NoString
            return sample(random.choice(options), random, longest)
        case Repeat(body, least, most):
            count = random.randint(least, least + longest if most is None else min(most, least + longest))
            return "".join(sample(body, random, longest) for _ in range(count))
        case Both(left, right):
            for _ in range(60):
                for one, other in ((left, right), (right, left)):
                    if holds(other, found := sample(one, random, longest)):
                        return found
            raise NoString
        case Except(left, right):
            for _ in range(60):
                if not holds(right, found := sample(left, random, longest)):
                    return found
            raise NoString


def size(expression: Expression) -> int:
    """How many nodes an expression has, one for each place where it stands."""
    match expression:
        case Chars():
            return 1
        case Join(inner) | Either(inner):
            return 1 + sum(map(size, inner))
        case Repeat(body, _, _):
            return 1 + size(body)
        case Both(left, right) | Except(left, right):
            return 1 + size(left) + size(right)
