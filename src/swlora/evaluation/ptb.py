"""Penn-Treebank tokens of a sentence without Java, as the E2E scores are defined on them.

The reference is PTBTokenizer of Stanford CoreNLP 3.4.1 with -preserveLines -lowerCase, followed
by dropping the punctuation tokens of the COCO caption evaluation. It is a longest-match scanner:
at each position every rule is tried, the longest match wins (the first rule on a tie), and a
rule may look at text behind its token, which counts for the length. The same scheme is used here
with the rules restaurant descriptions need; they give the tokens of the Java program on every
reference of the E2E data set. Outside its reach: web and e-mail addresses, mark-up, telephone
numbers, mixed fractions ("1 1/2") and American state abbreviations.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-",
     ".", "?", "!", ",", ":", "-", "--", "...", ";")
)  # fmt: skip
"""Tokens dropped after tokenising. The bracket names are upper case in the official list, so the
lower-cased "-lrb-" stays in the text; the scores are defined with that."""

_APOSTROPHE = "['’]"
_LETTER = r"[^\W\d_]"
_ALNUM = r"[^\W_]"
_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"
_ELIDED = rf"(?:[dDoOlL]{_APOSTROPHE}{_ALNUM}{{2,}})"
_COMPOUND = rf"(?:{_ELIDED}|{_ALNUM}+)(?:-(?:{_ELIDED}|{_ALNUM}+))*"
_ASCII_COMPOUND = r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+"
_SLASH_PART = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_ABBREVIATIONS = (
    "adj|al|assoc|ave|bldg|blvd|bros|capt|cf|co|corp|ct|dept|dr|esq|est|etc|ext|ft|gen|gov|hon|inc"
    "|intl|jr|lt|ltd|maj|messrs|mr|mrs|ms|mt|natl|ph\\.d|pres|prof|rd|rep|rev|sen|sgt|sq|sr|st|tel"
    "|univ|vs|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri"
)
_STARTER = re.compile(
    "a|about|according|additionally|after|an|as|at|but|he|her|here|however|if|in|it|last|many|more"
    "|now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these|they|this|we"
    "|what|when|while|yet|you"
)
"""Words that, capitalised, make the full stop of a single letter end its sentence ("B. The")."""

# Each rule is one group, the token, and what must follow it.
_RULES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"([A-Za-z]*[A-MO-Za-mo-z])[nN]{_APOSTROPHE}[tT]",
        rf"([nN]{_APOSTROPHE}[tT])",
        rf"({_WORD}|{_COMPOUND}){_APOSTROPHE}(?i:[smd]|re|ve|ll)(?![A-Za-z])",
        rf"({_APOSTROPHE}(?i:[smd]|re|ve|ll))(?![A-Za-z])",
        r"(?i:(can)not)",
        r"(?i:(gon|wan)na)",
        r"(?i:(got)ta)",
        r"(?i:(gim|lem)me)",
        rf"({_APOSTROPHE}[tT])(?i:is|was)",
        rf"([yY]{_APOSTROPHE})[aA]ll",
        rf"({_WORD})",
        rf"({_APOSTROPHE}(?:n{_APOSTROPHE}|n(?![A-Za-z])|em|till?|cause)|[lLdDjJ]{_APOSTROPHE})",
        rf"([A-HJ-XZn]{_APOSTROPHE}{_LETTER}{{2,}})",
        rf"({_LETTER}+[aeiouyAEIOUY]{_APOSTROPHE}[aeiouA-Z]{_LETTER}*)",
        rf"({_APOSTROPHE}[0-9]{{2}}s?)(?![-0-9])",
        rf"((?:{_WORD}|{_COMPOUND}|{_ASCII_COMPOUND})\.)[,;:]",
        rf"((?i:{_ABBREVIATIONS}|[a-z](?:\.[a-z])*)\.)",
        r"([A-Za-z])\. The$",
        r"((?i:nos?|pp|fig|art|ca)\.) ?[0-9]",
        rf"({_COMPOUND})",
        rf"({_ASCII_COMPOUND})",
        rf"({_SLASH_PART}(?:\\?/{_SLASH_PART}){{1,2}})",
        r"([A-Z]+(?:[+&][A-Z]+)+)",
        r"([A-Za-z0-9]+(?:_[A-Za-z0-9]+)+)",
        r"([-+]?(?:\d*(?:[.:,]\d+)+|\d+))",
        r"((?:US|A|C|HK|NZ)?\$)",
        r"([<>]?[:;=][-o*']?[()DPdp])(?![A-Za-z0-9])",
        r"([?!]+|\*+|_+|#+|-{2,}|\.{3})",
        r"(.)",
    )
)
_SPELLED = {"£": "#", "€": "$", "½": "1/2", "¼": "1/4", "¾": "3/4", "…": "...", "–": "--"}
_SPELLED |= {"—": "--", "‘": "`", "“": "``", "”": "''", '"': "``"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def _spell(token: str) -> str:
    if token.startswith("--"):
        return "--"
    if token[0] == "’" or token.endswith("’t"):
        token = token.replace("’", "'")  # "’s" and "n’t"; elsewhere it stays: "d’oeuvre"
    token = _SPELLED.get(token, token).lower()
    return "".join(_BRACKETS.get(character, character) for character in token)


def _context(chunk: str, following: str) -> str:
    """What a scanner can see of the next word, reduced to the two kinds that matter."""
    if not chunk.endswith("."):
        return ""
    if following[:1].isupper() and _STARTER.fullmatch(following.lower()):
        return " The"
    return " 0" if following[:1].isdigit() else ""


@lru_cache(maxsize=1 << 16)
def _tokens_of_chunk(chunk: str, context: str) -> tuple[str, ...]:
    """Tokens of text without white space. Cached: a corpus repeats few distinct chunks."""
    tokens, position, text = [], 0, chunk + context
    while position < len(chunk):
        matches = (rule.match(text, position) for rule in _RULES)
        # max() keeps the first of equals, which is the scanner's rule on ties.
        longest = max((match for match in matches if match), key=lambda match: match.end())
        tokens.append(_spell(longest[longest.lastindex or 1]))
        position = longest.end(longest.lastindex or 1)
    return tuple(token for token in tokens if token not in PUNCTUATION)


def ptb_tokenize(texts: Sequence[str]) -> list[list[str]]:
    """Lower-cased Penn-Treebank tokens of each text, punctuation dropped (a list may be empty).

    As in the Java program, which reads one stream, the word that decides whether a full stop
    belongs to an abbreviation may be the first of the next text.
    """
    tokenized: list[list[str]] = []
    following = ""
    for text in reversed(texts):
        tokens: list[str] = []
        for chunk in reversed(text.split()):
            tokens[:0] = _tokens_of_chunk(chunk, _context(chunk, following))
            following = chunk
        tokenized.append(tokens)
    return tokenized[::-1]
