"""Words, noise and prose that samples are made of; nothing is downloaded."""

from __future__ import annotations

import functools
import itertools
import random
import re
import string
import uuid
from collections.abc import Iterator

from bench.ruler.base import Encode
from bench.tools.prose import prose

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    """amber ancient bitter brave bright broad calm cheerful clever coastal cold copper crisp curious dark deep
distant dusty eager early eastern elegant faint famous fierce fragile fresh gentle giant golden grand green happy heavy
hidden hollow honest humble icy idle jolly keen large lazy light lively lonely loud lucky mellow mighty modern narrow
noble northern odd orange pale patient plain polite proud purple quick quiet rapid rare red rough royal rusty sharp
silent silver simple slow small smooth soft solid spicy steady strange strong sunny swift tall tender tiny vast violet
warm western white wild wise wooden yellow young"""
)
NOUNS = _words(
    """anchor apple arrow autumn badger barn basket beach bell bird boat bridge brook bucket button cabin camel
candle canyon carpet castle cedar chair cherry circle cliff cloud coin comet corner cotton cradle crane creek crown
daisy desert dolphin donkey door dragon eagle ember engine falcon feather fence field finger flame forest fountain fox
garden gate giraffe glacier glove grape hammer harbor hat hawk hill honey horse island jacket jewel kettle kitten
ladder lake lamp lantern leaf lemon lion lizard maple market meadow melon mirror moon mountain needle nest ocean
orchard otter owl paddle palace panther paper peach pearl pebble pencil pepper pigeon pillow planet plum pocket pond
prairie rabbit raven ribbon river road robin rocket root rose saddle salmon sand shell shield ship shoe spider spoon
spring squirrel stone storm stream summer swan table temple thunder tiger tower train trumpet tulip tunnel turtle
valley velvet village violin wagon walnut water weasel wheel whistle willow window winter wolf yarn zebra"""
)
FIRST = _words(
    """Alma Boris Clara Dario Edith Felix Greta Hugo Irene Jonas Karin Leon Mara Nils Olga Pavel Rosa Simon Tilda
Ulrich Vera Walter Xenia Yuri Zora Amir Bela Chen Dunja Emil"""
)
LAST = _words(
    """Abbot Brenner Castell Dorn Egger Farkas Gruber Holm Ivers Jansen Keller Lindt Moreau Novak Ostrow Petrov
Quist Rossi Sander Thorn Ulven Varga Weber Yilmaz Zeller"""
)
CITIES = _words(
    """Lisbon Oslo Cairo Lima Kyoto Dublin Quito Prague Hanoi Boston Vienna Dakar Turin Perth Riga Accra Seoul
Bergen Havana Tunis Geneva Porto Delhi Sofia"""
)
JOBS = _words(
    """baker carpenter surgeon pilot gardener violinist teacher plumber lawyer printer beekeeper translator
geologist painter blacksmith librarian sailor tailor welder jeweller"""
)
ANIMALS = _words("parrots goats ferrets tortoises spaniels ponies canaries rabbits geckos ducks geese mules")
INSTRUMENTS = _words("cello flute harp oboe trombone banjo clarinet accordion lute bassoon mandolin organ")


def word(rng: random.Random) -> str:
    """Return a key such as ``amber-river``: one of some 16,000."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: random.Random) -> str:
    """Return seven digits."""
    return str(rng.randrange(1_000_000, 10_000_000))


def identifier(rng: random.Random) -> str:
    """Return a random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, count: int, upper: bool) -> str:
    """Return random letters: a variable's or coded word's name."""
    return "".join(rng.choices(string.ascii_uppercase if upper else string.ascii_lowercase, k=count))


def noise(encode: Encode) -> Iterator[list[int]]:
    """Return RULER's repeated sentences, a line a unit, without end."""
    return itertools.repeat(encode(f"{NOISE}\n"))


def essay(encode: Encode, rng: random.Random) -> Iterator[list[int]]:
    """Return the sentences of real prose from a random place on, without end."""
    sentences = _sentences()
    start = rng.randrange(len(sentences))
    return (encode(sentences[i % len(sentences)]) for i in itertools.count(start))


@functools.cache
def _sentences() -> list[str]:
    flat = re.sub(r"\s+", " ", prose())
    return [f"{s} " for s in re.split(r"(?<=[.!?]) ", flat) if 20 <= len(s) <= 400]
