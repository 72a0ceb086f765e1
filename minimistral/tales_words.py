"""The words of the tales: five phrasebooks for one and the same kind of story.

A template names slots, `{who}`, and where a language bends a word, the form it wants,
`{thing:acc}`. Every language tells every kind of event in the same number of ways, in the
same order, so that a tale can be retold in another language sentence by sentence.
"""

GENDER = {  # of the characters, in the order of how often they appear
    "Anna": "f", "Hugo": "m", "Clara": "f", "Leo": "m", "Nora": "f", "David": "m",
    "Emma": "f", "Paul": "m", "Mia": "f", "Bruno": "m", "Eva": "f", "Max": "m",
}

NOUNS = {  # the noun in each language; its gender where the language has one
    "key": {"en": ("key", ""), "fr": ("clé", "f"), "de": ("Schlüssel", "m"),
            "es": ("llave", "f"), "it": ("chiave", "f")},
    "lantern": {"en": ("lantern", ""), "fr": ("lanterne", "f"), "de": ("Laterne", "f"),
                "es": ("farol", "m"), "it": ("lanterna", "f")},
    "book": {"en": ("book", ""), "fr": ("livre", "m"), "de": ("Buch", "n"),
             "es": ("libro", "m"), "it": ("libro", "m")},
    "ring": {"en": ("ring", ""), "fr": ("anneau", "m"), "de": ("Ring", "m"),
             "es": ("anillo", "m"), "it": ("anello", "m")},
    "map": {"en": ("map", ""), "fr": ("carte", "f"), "de": ("Karte", "f"),
            "es": ("mapa", "m"), "it": ("mappa", "f")},
    "mirror": {"en": ("mirror", ""), "fr": ("miroir", "m"), "de": ("Spiegel", "m"),
               "es": ("espejo", "m"), "it": ("specchio", "m")},
    "flute": {"en": ("flute", ""), "fr": ("flûte", "f"), "de": ("Flöte", "f"),
              "es": ("flauta", "f"), "it": ("flauto", "m")},
    "box": {"en": ("box", ""), "fr": ("boîte", "f"), "de": ("Kästchen", "n"),
            "es": ("caja", "f"), "it": ("scatola", "f")},
    "hat": {"en": ("hat", ""), "fr": ("chapeau", "m"), "de": ("Hut", "m"),
            "es": ("sombrero", "m"), "it": ("cappello", "m")},
    "cup": {"en": ("cup", ""), "fr": ("tasse", "f"), "de": ("Tasse", "f"),
            "es": ("taza", "f"), "it": ("tazza", "f")},
    "bell": {"en": ("bell", ""), "fr": ("clochette", "f"), "de": ("Glocke", "f"),
             "es": ("campanilla", "f"), "it": ("campanella", "f")},
    "umbrella": {"en": ("umbrella", ""), "fr": ("parapluie", "m"),
                 "de": ("Schirm", "m"), "es": ("paraguas", "m"),
                 "it": ("ombrello", "m")},
}

LOOKS = {  # adjectives: masculine and feminine in the Romance languages, stem in German
    "old": {"en": "old", "fr": ("vieux", "vieille"), "de": "alt",
            "es": ("viejo", "vieja"), "it": ("vecchio", "vecchia")},
    "red": {"en": "red", "fr": ("rouge", "rouge"), "de": "rot",
            "es": ("rojo", "roja"), "it": ("rosso", "rossa")},
    "small": {"en": "small", "fr": ("petit", "petite"), "de": "klein",
              "es": ("pequeño", "pequeña"), "it": ("piccolo", "piccola")},
    "golden": {"en": "golden", "fr": ("doré", "dorée"), "de": "golden",
               "es": ("dorado", "dorada"), "it": ("dorato", "dorata")},
    "blue": {"en": "blue", "fr": ("bleu", "bleue"), "de": "blau",
             "es": ("azul", "azul"), "it": ("blu", "blu")},
    "green": {"en": "green", "fr": ("vert", "verte"), "de": "grün",
              "es": ("verde", "verde"), "it": ("verde", "verde")},
    "black": {"en": "black", "fr": ("noir", "noire"), "de": "schwarz",
              "es": ("negro", "negra"), "it": ("nero", "nera")},
}

PLACES = {  # where somebody is, and where somebody goes
    "mill": {"en": ("in the mill", "to the mill"), "fr": ("au moulin", "au moulin"),
             "de": ("in der Mühle", "zur Mühle"),
             "es": ("en el molino", "al molino"),
             "it": ("al mulino", "al mulino")},
    "garden": {"en": ("in the garden", "to the garden"),
               "fr": ("dans le jardin", "au jardin"),
               "de": ("im Garten", "in den Garten"),
               "es": ("en el jardín", "al jardín"),
               "it": ("in giardino", "in giardino")},
    "bridge": {"en": ("on the bridge", "to the bridge"),
               "fr": ("sur le pont", "sur le pont"),
               "de": ("auf der Brücke", "zur Brücke"),
               "es": ("en el puente", "al puente"), "it": ("sul ponte", "al ponte")},
    "market": {"en": ("at the market", "to the market"), "fr": ("au marché", "au marché"),
               "de": ("auf dem Markt", "zum Markt"),
               "es": ("en el mercado", "al mercado"),
               "it": ("al mercato", "al mercato")},
    "forest": {"en": ("in the forest", "to the forest"),
               "fr": ("dans la forêt", "dans la forêt"),
               "de": ("im Wald", "in den Wald"),
               "es": ("en el bosque", "al bosque"),
               "it": ("nel bosco", "nel bosco")},
    "school": {"en": ("at school", "to school"), "fr": ("à l'école", "à l'école"),
               "de": ("in der Schule", "zur Schule"),
               "es": ("en la escuela", "a la escuela"),
               "it": ("a scuola", "a scuola")},
    "harbour": {"en": ("at the harbour", "to the harbour"), "fr": ("au port", "au port"),
                "de": ("am Hafen", "zum Hafen"),
                "es": ("en el puerto", "al puerto"), "it": ("al porto", "al porto")},
    "tower": {"en": ("in the tower", "to the tower"),
              "fr": ("dans la tour", "à la tour"), "de": ("im Turm", "zum Turm"),
              "es": ("en la torre", "a la torre"),
              "it": ("nella torre", "alla torre")},
    "lake": {"en": ("at the lake", "to the lake"), "fr": ("au bord du lac", "au lac"),
             "de": ("am See", "zum See"), "es": ("junto al lago", "al lago"),
             "it": ("in riva al lago", "al lago")},
    "library": {"en": ("in the library", "to the library"),
                "fr": ("à la bibliothèque", "à la bibliothèque"),
                "de": ("in der Bibliothek", "zur Bibliothek"),
                "es": ("en la biblioteca", "a la biblioteca"),
                "it": ("in biblioteca", "in biblioteca")},
}

PHRASES = {
    "en": {
        "title": ["{new:title}"],
        "find": ["{who} found {new:a} {place:in}.",
                 "One morning {who} found {new:a} {place:in}.",
                 "One day {who} saw {new:a} {place:in} and took it."],
        "arrive": ["{who} was {place:in}.",
                   "{who} was waiting {place:in}.",
                   "Meanwhile {who} was playing {place:in}."],
        "go": ["{who} went {place:to}.",
               "Then {who:he} walked {place:to}.",
               "{who} ran {place:to}."],
        "meet": ["{who} met {whom} {place:in}.",
                 "{who} went {place:to} and saw {whom} there."],
        "give": ["{who} gave {thing:acc} to {whom}.",
                 "{who} handed {whom} {thing:acc}.",
                 '"This is for you," said {who} and gave {thing:acc} to {whom}.'],
        "drop": ["{who} left {thing:acc} {place:in}.",
                 "Then {who:he} hid {thing:acc} {place:in}."],
        "take": ["{who} picked up {thing:acc}.",
                 "{who} took {thing:acc}."],
        "fetch": ["{who} went {place:to} and took {thing:acc}.",
                  "{who} found {thing:acc} again {place:in}."],
        "discover": ["Later {who} also found {new:a} {place:in}."],
        "ask": ['"Where is {thing:the}?" asked {who}. "I have it," said {whom}.',
                '"Who has {thing:acc}?" asked {who}. "I do," said {whom}.'],
        "ask_where": ['"Where is {thing:the}?" asked {who}. '
                      '"It is {place:in}," said {whom}.'],
        "seek": ['"Where is {whom}?" asked {who}. {whom} was {place:in}.'],
        "mood": ["{who} was very happy.",
                 "{who:He} sang a little song.",
                 "{who} laughed."],
        "weather": ["The sun was shining.", "It was raining.", "The wind was blowing."],
        "end_held": ["Now {who} has {thing:acc}.",
                     "And so {who} kept {thing:acc}."],
        "end_lying": ["{thing:The} is still {place:in}.",
                      "In the end {thing:the} stayed {place:in}."],
        "end_with": ["That evening {who} was {place:in} with {thing:dat}."],
        "end_both": ["In the end {who} had {thing:acc}, and {whom} was {place:in}."],
    },
    "fr": {
        "title": ["{new:title}"],
        "find": ["{who} trouva {new:a} {place:in}.",
                 "Un matin, {who} trouva {new:a} {place:in}.",
                 "Un jour, {who} vit {new:a} {place:in} et {new:it} prit."],
        "arrive": ["{who} était {place:in}.",
                   "{who} attendait {place:in}.",
                   "Pendant ce temps, {who} jouait {place:in}."],
        "go": ["{who} alla {place:to}.",
               "Puis {who:he} se rendit {place:to}.",
               "{who} courut {place:to}."],
        "meet": ["{who} rencontra {whom} {place:in}.",
                 "{who} alla {place:to} et y vit {whom}."],
        "give": ["{who} donna {thing:acc} à {whom}.",
                 "{who} tendit {thing:acc} à {whom}.",
                 "« C'est pour toi », dit {who} en donnant {thing:acc} à {whom}."],
        "drop": ["{who} laissa {thing:acc} {place:in}.",
                 "Puis {who:he} cacha {thing:acc} {place:in}."],
        "take": ["{who} ramassa {thing:acc}.",
                 "{who} prit {thing:acc}."],
        "fetch": ["{who} alla {place:to} et prit {thing:acc}.",
                  "{who} retrouva {thing:acc} {place:in}."],
        "discover": ["Plus tard, {who} trouva aussi {new:a} {place:in}."],
        "ask": ["« Où est {thing:the} ? » demanda {who}. "
                "« C'est moi qui l'ai », répondit {whom}.",
                "« Qui a {thing:acc} ? » demanda {who}. « Moi », répondit {whom}."],
        "ask_where": ["« Où est {thing:the} ? » demanda {who}. "
                      "« {thing:It} est {place:in} », répondit {whom}."],
        "seek": ["« Où est {whom} ? » demanda {who}. {whom} était {place:in}."],
        "mood": ["{who} était très {who:glad}.",
                 "{who:He} chanta une petite chanson.",
                 "{who} se mit à rire."],
        "weather": ["Le soleil brillait.", "Il pleuvait.", "Le vent soufflait."],
        "end_held": ["Maintenant, {who} a {thing:acc}.",
                     "Et {who} garda {thing:acc}."],
        "end_lying": ["{thing:The} est toujours {place:in}.",
                      "À la fin, {thing:the} resta {place:in}."],
        "end_with": ["Ce soir-là, {who} était {place:in} avec {thing:dat}."],
        "end_both": ["À la fin, {who} avait {thing:acc}, et {whom} était {place:in}."],
    },
    "de": {
        "title": ["{new:title}"],
        "find": ["{who} fand {place:in} {new:a}.",
                 "Eines Morgens fand {who} {place:in} {new:a}.",
                 "Eines Tages sah {who} {place:in} {new:a} und nahm {new:it} mit."],
        "arrive": ["{who} war {place:in}.",
                   "{who} wartete {place:in}.",
                   "Inzwischen spielte {who} {place:in}."],
        "go": ["{who} ging {place:to}.",
               "Dann lief {who:he} {place:to}.",
               "{who} rannte {place:to}."],
        "meet": ["{who} traf {whom} {place:in}.",
                 "{who} ging {place:to} und sah dort {whom}."],
        "give": ["{who} gab {whom} {thing:acc}.",
                 "{who} reichte {whom} {thing:acc}.",
                 "„Das ist für dich“, sagte {who} und gab {whom} {thing:acc}."],
        "drop": ["{who} ließ {thing:acc} {place:in} zurück.",
                 "Dann versteckte {who:he} {thing:acc} {place:in}."],
        "take": ["{who} hob {thing:acc} auf.",
                 "{who} nahm {thing:acc} mit."],
        "fetch": ["{who} ging {place:to} und holte {thing:acc}.",
                  "{who} fand {thing:acc} {place:in} wieder."],
        "discover": ["Später fand {who} {place:in} auch {new:a}."],
        "ask": ["„Wo ist {thing:the}?“, fragte {who}. "
                "„Ich habe {thing:it}“, sagte {whom}.",
                "„Wer hat {thing:acc}?“, fragte {who}. „Ich“, sagte {whom}."],
        "ask_where": ["„Wo ist {thing:the}?“, fragte {who}. "
                      "„{thing:It} ist {place:in}“, sagte {whom}."],
        "seek": ["„Wo ist {whom}?“, fragte {who}. {whom} war {place:in}."],
        "mood": ["{who} freute sich sehr.",
                 "{who:He} sang ein kleines Lied.",
                 "{who} lachte."],
        "weather": ["Die Sonne schien.", "Es regnete.", "Der Wind wehte."],
        "end_held": ["Jetzt hat {who} {thing:acc}.",
                     "Und so behielt {who} {thing:acc}."],
        "end_lying": ["{thing:The} ist noch immer {place:in}.",
                      "Am Ende blieb {thing:the} {place:in}."],
        "end_with": ["An diesem Abend war {who} mit {thing:dat} {place:in}."],
        "end_both": ["Am Ende hatte {who} {thing:acc}, und {whom} war {place:in}."],
    },
    "es": {
        "title": ["{new:title}"],
        "find": ["{who} encontró {new:a} {place:in}.",
                 "Una mañana, {who} encontró {new:a} {place:in}.",
                 "Un día, {who} vio {new:a} {place:in} y se {new:it} llevó."],
        "arrive": ["{who} estaba {place:in}.",
                   "{who} esperaba {place:in}.",
                   "Mientras tanto, {who} jugaba {place:in}."],
        "go": ["{who} fue {place:to}.",
               "Luego se dirigió {place:to}.",
               "{who} corrió {place:to}."],
        "meet": ["{who} se encontró con {whom} {place:in}.",
                 "{who} fue {place:to} y allí vio a {whom}."],
        "give": ["{who} le dio {thing:acc} a {whom}.",
                 "{who} le entregó {thing:acc} a {whom}.",
                 "—Es para ti —dijo {who}, y le dio {thing:acc} a {whom}."],
        "drop": ["{who} dejó {thing:acc} {place:in}.",
                 "Luego escondió {thing:acc} {place:in}."],
        "take": ["{who} recogió {thing:acc}.",
                 "{who} tomó {thing:acc}."],
        "fetch": ["{who} fue {place:to} y recogió {thing:acc}.",
                  "{who} volvió a encontrar {thing:acc} {place:in}."],
        "discover": ["Más tarde, {who} también encontró {new:a} {place:in}."],
        "ask": ["—¿Dónde está {thing:the}? —preguntó {who}. "
                "—{thing:It} tengo yo —dijo {whom}.",
                "—¿Quién tiene {thing:acc}? —preguntó {who}. —Yo —dijo {whom}."],
        "ask_where": ["—¿Dónde está {thing:the}? —preguntó {who}. "
                      "—Está {place:in} —dijo {whom}."],
        "seek": ["—¿Dónde está {whom}? —preguntó {who}. {whom} estaba {place:in}."],
        "mood": ["{who} estaba muy {who:glad}.",
                 "Cantó una canción.",
                 "{who} se echó a reír."],
        "weather": ["Brillaba el sol.", "Llovía.", "Soplaba el viento."],
        "end_held": ["Ahora {who} tiene {thing:acc}.",
                     "Y así {who} se quedó con {thing:dat}."],
        "end_lying": ["{thing:The} sigue {place:in}.",
                      "Al final, {thing:the} se quedó {place:in}."],
        "end_with": ["Aquella noche, {who} estaba {place:in} con {thing:dat}."],
        "end_both": ["Al final, {who} tenía {thing:acc} y {whom} estaba {place:in}."],
    },
    "it": {
        "title": ["{new:title}"],
        "find": ["{who} trovò {new:a} {place:in}.",
                 "Una mattina {who} trovò {new:a} {place:in}.",
                 "Un giorno {who} vide {new:a} {place:in} e {new:it} prese con sé."],
        "arrive": ["{who} era {place:in}.",
                   "{who} aspettava {place:in}.",
                   "Intanto {who} giocava {place:in}."],
        "go": ["{who} andò {place:to}.",
               "Poi se ne andò {place:to}.",
               "{who} corse {place:to}."],
        "meet": ["{who} incontrò {whom} {place:in}.",
                 "{who} andò {place:to} e lì vide {whom}."],
        "give": ["{who} diede {thing:acc} {whom:to}.",
                 "{who} consegnò {thing:acc} {whom:to}.",
                 "«È per te» disse {who}, e diede {thing:acc} {whom:to}."],
        "drop": ["{who} lasciò {thing:acc} {place:in}.",
                 "Poi nascose {thing:acc} {place:in}."],
        "take": ["{who} raccolse {thing:acc}.",
                 "{who} prese {thing:acc}."],
        "fetch": ["{who} andò {place:to} e prese {thing:acc}.",
                  "{who} ritrovò {thing:acc} {place:in}."],
        "discover": ["Più tardi {who} trovò anche {new:a} {place:in}."],
        "ask": ["«Dov'è {thing:the}?» chiese {who}. «Ce l'ho io» disse {whom}.",
                "«Chi ha {thing:acc}?» chiese {who}. «Io» rispose {whom}."],
        "ask_where": ["«Dov'è {thing:the}?» chiese {who}. "
                      "«È {place:in}» disse {whom}."],
        "seek": ["«Dov'è {whom}?» chiese {who}. {whom} era {place:in}."],
        "mood": ["{who} era molto {who:glad}.",
                 "Cantò una canzone.",
                 "{who} si mise a ridere."],
        "weather": ["Splendeva il sole.", "Pioveva.", "Soffiava il vento."],
        "end_held": ["Ora {who} ha {thing:acc}.",
                     "E così {who} tenne {thing:acc}."],
        "end_lying": ["{thing:The} è ancora {place:in}.",
                      "Alla fine {thing:the} rimase {place:in}."],
        "end_with": ["Quella sera {who} era {place:in} con {thing:dat}."],
        "end_both": ["Alla fine {who} aveva {thing:acc}, mentre {whom} era {place:in}."],
    },
}

GLAD = {"fr": {"m": "heureux", "f": "heureuse"}, "es": {"m": "contento", "f": "contenta"},
        "it": {"m": "contento", "f": "contenta"}}


def article(language: str, kind: str, gender: str, word: str) -> str:
    """The article before `word`, with its space or apostrophe: kind "a" or "the"."""
    vowel = word[0] in "aeiou"
    if language == "en":
        return "the " if kind == "the" else "an " if vowel else "a "
    if language == "es":
        return {"a": {"m": "un ", "f": "una "}, "the": {"m": "el ", "f": "la "}}[kind][gender]
    if language == "fr":
        if kind == "the" and vowel:
            return "l'"
        return {"a": {"m": "un ", "f": "une "}, "the": {"m": "le ", "f": "la "}}[kind][gender]
    hard = word.startswith(("sp", "st", "sc", "z"))  # lo specchio, uno specchio
    if kind == "the" and vowel:
        return "l'"
    if gender == "f":
        return "la " if kind == "the" else "un'" if vowel else "una "
    if kind == "the":
        return "lo " if hard else "il "
    return "uno " if hard else "un "


def look_and_noun(language: str, noun: str, look: str) -> str:
    """Adjective and noun in the order of the language: "red key", "clé rouge"."""
    word, gender = NOUNS[noun][language]
    if language == "en":
        return f"{LOOKS[look]['en']} {word}"
    adjective = LOOKS[look][language][gender == "f"]
    if language == "fr" and look == "old" and gender == "m" and word[0] in "aeiou":
        adjective = "vieil"
    first = look in ("old", "small")  # in the Romance languages these stand before the noun
    return f"{adjective} {word}" if first else f"{word} {adjective}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


GERMAN = {  # article and ending of the adjective: a new thing (acc.), the same (nom.)
    "m": {"a": ("einen", "en"), "the": ("der", "e"), "acc": "den", "dat": "dem",
          "it": "ihn", "It": "Er"},
    "f": {"a": ("eine", "e"), "the": ("die", "e"), "acc": "die", "dat": "der",
          "it": "sie", "It": "Sie"},
    "n": {"a": ("ein", "es"), "the": ("das", "e"), "acc": "das", "dat": "dem",
          "it": "es", "It": "Es"},
}
PRONOUNS = {  # the object, and the subject that opens a sentence
    "en": {"": ("it", "It")},
    "fr": {"m": ("le", "Il"), "f": ("la", "Elle")},
    "es": {"m": ("lo", "Lo"), "f": ("la", "La")},
    "it": {"m": ("lo", "Lo"), "f": ("la", "La")},
}


def thing_forms(language: str, noun: str) -> dict[str, str]:
    """The forms of a thing already known: the, The, acc, dat, it, It."""
    word, gender = NOUNS[noun][language]
    if language == "de":
        bend = GERMAN[gender]
        the, accusative, dative = (f"{form} {word}" for form in
                                   (bend["the"][0], bend["acc"], bend["dat"]))
        it, capital_it = bend["it"], bend["It"]
    else:
        the = accusative = dative = article(language, "the", gender, word) + word
        it, capital_it = PRONOUNS[language][gender]
    return {"the": the, "The": capital(the), "acc": accusative, "dat": dative,
            "it": it, "It": capital_it}


def new_forms(language: str, noun: str, look: str) -> dict[str, str]:
    """The forms of a thing with its look: title, a (accusative), it."""
    word, gender = NOUNS[noun][language]
    if language == "de":
        bend, stem = GERMAN[gender], LOOKS[look]["de"]
        a, the = (f"{bend[kind][0]} {stem}{bend[kind][1]} {word}" for kind in ("a", "the"))
        it = bend["it"]
    else:
        phrase = look_and_noun(language, noun, look)
        a, the = (article(language, kind, gender, phrase) + phrase for kind in ("a", "the"))
        it = PRONOUNS[language][gender][0]
    return {"title": capital(the), "a": a, "it": it}


def person_forms(language: str, name: str) -> dict[str, str]:
    """The forms of a character: the plain name, to (dative), he, He, glad (agreeing)."""
    to = {"it": "ad " if name[0] == "A" else "a "}.get(language, "") + name
    he = {"en": "he she", "fr": "il elle", "de": "er sie"}.get(language, "- -")
    he = he.split()[GENDER[name] == "f"]
    return {"": name, "to": to, "he": he, "He": capital(he),
            "glad": GLAD.get(language, {}).get(GENDER[name], "")}


def place_forms(language: str, place: str) -> dict[str, str]:
    here, there = PLACES[place][language]
    return {"in": here, "to": there}
