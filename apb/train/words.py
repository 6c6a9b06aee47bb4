"""Words that generated documents are made of."""

from __future__ import annotations

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "It rained in the morning and cleared up by noon. Nobody was in a hurry.",
    "The train was late again. People read their papers and waited.",
    "Some days are long and some are short. Most are somewhere in between.",
)
ADJECTIVES = (
    "amber ancient bitter brave bright broken calm careful clever cold crimson curious distant eager early elegant "
    "empty faint famous fierce final foggy forgotten fragile gentle giant golden grave happy heavy hidden hollow "
    "humble icy idle jolly keen kind late lively lonely lucky mellow mighty modest narrow neat noble noisy odd old "
    "pale patient plain polite proud quick quiet rapid rare restless rich rough royal rusty sacred secret shallow "
    "sharp shy silent silver simple sleepy slow smooth solemn steady strange strong subtle sunny swift tall tame "
    "tender thin tidy tiny vague vast vivid warm weary wild wise witty wooden young"
).split()
NOUNS = (
    "anchor apple arrow badge barrel basket beacon bell bird blanket boat bottle bridge brush bucket button cabin "
    "camera candle canyon carpet castle chain chair cherry circle clock cloud coat comet compass copper corner cradle "
    "crown curtain desert diamond door drawer drum eagle engine falcon feather fence field flame flute forest fountain "
    "garden gate glacier glove guitar hammer harbor hat hill horizon island jacket jar journal kettle key kite ladder "
    "lake lamp lantern letter library lion lighthouse map marble market meadow mill mirror mountain museum needle "
    "nest notebook ocean orchard oven owl paddle page palace parcel pencil piano pillow planet pocket pond prairie "
    "puzzle quilt rabbit raft ribbon ring river road robin rocket rope saddle sail shadow shelf shell ship shoe "
    "signal sparrow spoon stable stamp star statue stone storm street table temple tent thread thunder ticket tiger "
    "tower trumpet tunnel umbrella valley vase village violin wagon wall water wheel whistle willow window wolf"
).split()
VERBS = (
    "admired borrowed carried chose cleaned counted described discovered drew followed found gathered guarded hid "
    "ignored kept lifted lost mended moved noticed opened ordered painted passed polished praised questioned reached "
    "remembered repaired replaced returned saved sold studied traded visited watched weighed"
).split()
FIRST_NAMES = (
    "Ada Alan Alice Anton Beatrice Boris Carla Carlos Clara Daniel Diana Edith Elena Emil Fatima Felix Flora George "
    "Greta Hana Harold Hugo Ida Irene Ivan Jonas Julia Karim Lena Leo Linda Louis Lucy Marco Maria Martha Milo Mina "
    "Nadia Nils Nora Oscar Otto Paula Pedro Petra Quentin Rosa Ruth Samuel Sofia Tariq Theo Uma Victor Vera Walter Yara"
).split()
LAST_NAMES = (
    "Abbott Becker Calder Dorsey Ellison Farrell Grant Hobbs Ingram Jansen Keller Lindqvist Mercer Novak Okafor Parker "
    "Quigley Rossi Sandoval Thornton Underhill Vasquez Whitaker Yamada Zimmer Archer Bramley Castell Dunmore Everett "
    "Fairfax Gorman Halvorsen Ibarra Jessop Kowalski Lambert Moreau Nakamura Osborne Pereira Ramsey Sorensen Tanaka"
).split()
CITIES = (
    "Lisbon Oslo Cairo Lima Kyoto Dublin Quito Prague Hanoi Boston Vienna Madrid Nairobi Sydney Toronto Havana Athens "
    "Warsaw Helsinki Geneva Lagos Delhi Manila Bogota Denver Riga Tunis Turin Porto Ghent Bergen Leeds Lyon Bonn"
).split()
JOBS = (
    "architect baker botanist carpenter chemist clerk composer dentist editor engineer farmer geologist jeweller "
    "judge lawyer librarian mechanic miner musician nurse painter pharmacist photographer pilot plumber poet printer "
    "sailor sculptor surgeon surveyor tailor teacher translator vet watchmaker weaver zoologist"
).split()
